"""Federations as a user starts them: command line, engines, comparison, reports."""
