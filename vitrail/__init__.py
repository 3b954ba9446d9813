"""What every other package stands on: runs, files, errors, types, console, seeding."""
