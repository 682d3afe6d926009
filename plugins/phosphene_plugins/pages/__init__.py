"""Shared by the HTML pages of the extensions: base template, panels as HTML, atomic writing."""
