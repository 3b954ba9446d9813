"""What to run: the command line and one YAML file per experiment."""
