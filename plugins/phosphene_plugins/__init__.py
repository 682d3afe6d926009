"""First-party techniques: one file and one entry point each."""
