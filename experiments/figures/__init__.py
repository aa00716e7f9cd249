"""Figures: an Altair chart with its text and numbers, written as PNG or SVG, or shown on a page that opens offline."""
