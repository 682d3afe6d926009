"""Image synthesis: activation maximisation, DeepDream and feature inversion."""
