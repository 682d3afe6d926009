"""Where models come from: URI schemes for ``load_model``."""
