"""What came of a sweep: its measures, tables, tests and pictures."""
