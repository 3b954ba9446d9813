"""Checks of a data set before it is trained on: unreadable files, duplicates, leaks."""
