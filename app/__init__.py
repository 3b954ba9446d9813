"""The web application: classify, zero-shot, search and explore, over run directories and galleries."""
