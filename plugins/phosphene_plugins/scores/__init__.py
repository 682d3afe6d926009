"""How far maps can be trusted."""
