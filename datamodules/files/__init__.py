"""Readers of label and caption files."""
