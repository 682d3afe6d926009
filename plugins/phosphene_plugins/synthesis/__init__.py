"""Pictures a model asks for."""
