"""Loading images and starting up."""
