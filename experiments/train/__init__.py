"""The command line that trains, and what it records."""
