"""Reads `outputs/` into tables and says which setting is best, and how sure that is. No torch here."""

from kd.analysis.comparison import Comparison, PairComparison, best_of, compare, compare_pair
from kd.analysis.loading import Runs, load_runs
from kd.analysis.statistics import Interval, Scores, document_interval, t_interval
from kd.analysis.verdict import verdict

__all__ = [
    "Comparison",
    "Interval",
    "PairComparison",
    "Runs",
    "Scores",
    "best_of",
    "compare",
    "compare_pair",
    "document_interval",
    "load_runs",
    "t_interval",
    "verdict",
]
