"""Compressed models in transformers."""
