"""Screens on which stages of work are shown (`tapfl.progress`)."""
