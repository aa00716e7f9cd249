"""The report of a run, or the comparison of several: one HTML page that opens offline, and its figures as PNG."""
