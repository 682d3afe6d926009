"""Vision and language: which pixels the words of an answer depend on."""
