"""Vision and language: the pixels of the words of an answer or a prompt."""
