"""Evaluation: the distance of one model from another, over functions from tokens to logits that know nothing of quantization; and
the rate and distortion of number formats on given matrices."""

from bitpress.evaluation.distance import Distance, measure_distance
from bitpress.evaluation.rate import Rate, draw_source, measure_rates

__all__ = ["Distance", "Rate", "draw_source", "measure_distance", "measure_rates"]
