"""Executors: the work of a run over a data set, computed by several processes or by a cluster."""
