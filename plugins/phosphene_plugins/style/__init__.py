"""Style transfer: the content of one image in the style of another."""
