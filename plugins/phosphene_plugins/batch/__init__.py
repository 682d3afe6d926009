"""Batches: plans of many models, methods and images in one resumable run, with a report."""
