"""Attention: what the tokens of a transformer attend to, and what that does to a score."""
