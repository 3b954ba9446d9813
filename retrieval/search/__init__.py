"""Queries: encoding them, scoring images, ranking."""
