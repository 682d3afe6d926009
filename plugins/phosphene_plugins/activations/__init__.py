"""What fires, where, and on which pictures."""
