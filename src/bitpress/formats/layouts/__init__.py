"""Layouts: how a row of codes becomes bytes."""
