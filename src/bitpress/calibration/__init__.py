"""Calibration: the text, what is captured of it inside a model, and the statistics that methods ask for."""

from bitpress.calibration.capture import Capture, Watched
from bitpress.calibration.samples import Document, Windows, builtin_texts, read_texts, sample_windows
from bitpress.calibration.stats import STATISTICS, Stats, StatsCollector

__all__ = [
    "STATISTICS",
    "Capture",
    "Document",
    "Stats",
    "StatsCollector",
    "Watched",
    "Windows",
    "builtin_texts",
    "read_texts",
    "sample_windows",
]
