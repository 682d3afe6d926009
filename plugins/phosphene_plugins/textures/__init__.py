"""Texture synthesis: images with the statistics of a sample."""
