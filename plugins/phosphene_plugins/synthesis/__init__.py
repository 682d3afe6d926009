"""Image synthesis: activation maximization, DeepDream and feature inversion."""
