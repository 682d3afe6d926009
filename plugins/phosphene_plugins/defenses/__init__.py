"""Making models harder to fool, and proving how hard."""
