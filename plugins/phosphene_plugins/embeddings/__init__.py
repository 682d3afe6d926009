"""How a model arranges pictures."""
