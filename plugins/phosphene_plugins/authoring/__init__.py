"""Commands for authors of plugins: ``phosphene new`` from a template, ``phosphene check`` of a method."""
