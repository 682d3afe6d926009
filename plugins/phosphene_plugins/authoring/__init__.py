"""The extension author's commands: a plugin begun from a template, and its promises put to the test."""
