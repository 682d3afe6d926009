"""Interventions: what a score or the accuracy is with activations replaced."""
