"""Grids: what a code means."""
