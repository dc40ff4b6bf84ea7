"""Loops that several quantizers share."""
