"""Concepts: directions in a layer that stand for something a person can name."""
