"""The commands of ``python -m datamodules``; ``vitrail.programs`` has the table."""
