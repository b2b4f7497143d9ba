"""Bytes at a path or URL. Imports nothing else of this project."""
