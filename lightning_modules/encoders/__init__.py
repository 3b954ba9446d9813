"""Image and text encoders, and their pairs."""
