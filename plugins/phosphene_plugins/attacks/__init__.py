"""Adversarial attacks: small perturbations of images that change the predicted class."""
