"""Small changes that change the answer."""
