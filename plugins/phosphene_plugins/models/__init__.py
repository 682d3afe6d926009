"""Model loaders: URI schemes for ``load_model``."""
