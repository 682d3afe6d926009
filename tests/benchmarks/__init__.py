"""Timings against other libraries; not tests."""
