"""Timings against named peers; not tests."""
