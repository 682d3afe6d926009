"""Activations: feature maps, maximally activating patches, and statistics of channels over a data set."""
