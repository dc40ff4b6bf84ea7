"""Measurement of whole models: distance from an original, tasks, perplexity, and the runtimes that serve them."""
