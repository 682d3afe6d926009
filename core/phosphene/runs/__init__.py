"""Runs: prepare, execute, observe, checkpoint and replay a call of a method.

``run``, ``prepare`` and ``replay`` are exported from ``phosphene``.
"""
