"""Comparison: what two models, or the layers of one, have in common."""
