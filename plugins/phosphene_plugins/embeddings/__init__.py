"""Embeddings: features of data sets, their projections, clusters, neighbors, outliers and set distances."""
