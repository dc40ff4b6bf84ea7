"""Transforms: rewrites of the network that keep its function and make its weights easier to compress."""

from bitpress.transforms.awq_scale import AWQScale
from bitpress.transforms.folding import Consumer, Fold, apply_fold_, find_folds
from bitpress.transforms.table import TRANSFORMS
from bitpress.transforms.transform import InputStats, ScaleSearch

__all__ = [
    "TRANSFORMS",
    "AWQScale",
    "Consumer",
    "Fold",
    "InputStats",
    "ScaleSearch",
    "apply_fold_",
    "find_folds",
]
