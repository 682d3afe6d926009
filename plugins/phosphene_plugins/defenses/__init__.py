"""Defenses: input transforms, adversarial and certified training, and certificates of robustness."""
