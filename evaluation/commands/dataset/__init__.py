"""Commands that look at a data set; ``vitrail.programs`` has the table."""
