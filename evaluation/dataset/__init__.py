"""What a data set looks like, and which images to label next."""
