"""Calibration: texts, recording a model's inputs while they run, and the statistics that methods need."""

from bitpress.calibration.attention import Role, find_roles
from bitpress.calibration.capture import Capture
from bitpress.calibration.observed import Observed
from bitpress.calibration.samples import Document, Samples, begin_tokens, builtin_texts, read_texts, sample_windows
from bitpress.calibration.stats import STATISTICS, Statistic, Stats, StatsCollector, of_origin

__all__ = [
    "STATISTICS",
    "Capture",
    "Document",
    "Observed",
    "Role",
    "Samples",
    "Statistic",
    "Stats",
    "StatsCollector",
    "begin_tokens",
    "builtin_texts",
    "find_roles",
    "of_origin",
    "read_texts",
    "sample_windows",
]
