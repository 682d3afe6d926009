"""The content of one picture in the manner of another."""
