"""Runs: prepare, execute, observe, checkpoint and replay a call of a method.

``run``, ``prepare``, ``load_result`` and ``replay`` are exported from ``phosphene``.
"""
