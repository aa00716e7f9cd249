"""Sweeps: many federations from one file, and their measures, tables, tests and figures."""
