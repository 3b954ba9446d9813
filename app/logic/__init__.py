"""What the tabs compute, without any page."""
