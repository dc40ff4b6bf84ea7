"""Evaluation: the distance between two models and the accuracy on multiple-choice questions, over functions from tokens to logits; and
the rate and distortion of number formats on matrices. Nothing here knows of quantization."""

from bitpress.evaluation.distance import Distance, Perplexity, measure_distance, measure_perplexity
from bitpress.evaluation.multiple_choice import Accuracy, Question, QuestionSet, lay_out, measure_accuracy, score_choices
from bitpress.evaluation.rate import Rate, draw_source, measure_rates
from bitpress.evaluation.tasks import TASKS, hash_questions, read_questions

__all__ = [
    "TASKS",
    "Accuracy",
    "Distance",
    "Perplexity",
    "Question",
    "QuestionSet",
    "Rate",
    "draw_source",
    "hash_questions",
    "lay_out",
    "measure_accuracy",
    "measure_distance",
    "measure_perplexity",
    "measure_rates",
    "read_questions",
    "score_choices",
]
