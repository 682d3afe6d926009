"""Scores: evaluation of attribution maps on a data set."""
