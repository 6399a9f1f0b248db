"""Reads `outputs/` into tables and says which setting is best, and how sure that is. No torch here."""

from kd.analysis.comparison import Comparison, PairComparison, compare, compare_pair
from kd.analysis.loading import Runs, load_runs
from kd.analysis.statistics import Interval, Scores, document_interval, equals_of_the_best, t_interval
from kd.analysis.verdict import verdict

__all__ = [
    "Comparison",
    "Interval",
    "PairComparison",
    "Runs",
    "Scores",
    "compare",
    "compare_pair",
    "document_interval",
    "equals_of_the_best",
    "load_runs",
    "t_interval",
    "verdict",
]
