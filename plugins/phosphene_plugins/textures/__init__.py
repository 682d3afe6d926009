"""Statistics without arrangement."""
