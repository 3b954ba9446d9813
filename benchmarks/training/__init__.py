"""Training steps against named peers."""
