"""The gallery: an HTML page with an example result of every method, and the command ``phosphene demo``."""
