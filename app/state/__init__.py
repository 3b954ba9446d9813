"""What the application serves, loaded once and shared by all visitors."""
