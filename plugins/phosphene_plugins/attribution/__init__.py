"""Which pixels a score depends on."""
