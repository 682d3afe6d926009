"""A page of what every method shows, and the command that makes it."""
