"""Side-by-side timings against named peers; each file is one command that prints ratios."""
