"""Filters: convolution weights as images."""
