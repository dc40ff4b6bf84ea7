"""Evaluation: the distance of one model from another. Functions from tokens to logits; nothing here knows of quantization."""

from bitpress.evaluation.distance import Distance, measure_distance

__all__ = ["Distance", "measure_distance"]
