"""Figures: one Altair description each, with its words and numbers; drawn into PNG and SVG files and offline pages."""
