"""Robustness evaluation: accuracy under attacks, and checks for masked gradients."""
