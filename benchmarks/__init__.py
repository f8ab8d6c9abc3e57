"""Measurements: what a figure in the README was measured with."""
