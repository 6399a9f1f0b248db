"""What the numbers can tell: intervals, and the set of settings that cannot be told from the best. Arrays only.

Two sources of noise stand between a table of losses and an answer. Another seed gives another student, and another
text favours another setting. Both are crossed with the settings: every setting sees the same seeds (initial weights,
data order) and is scored on the same documents, so what a seed or a document adds to all settings alike cancels in
differences, and only what it adds to one more than to another is noise. Blocks of one document are not independent;
documents are the units.

Losses are nats per token throughout.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

LEVEL = 0.95
MIN_DOCUMENTS = 5
"""With fewer, hardly any resampling differs from another, and no interval is honest."""
MAX_CLUSTERS = 1000
RESAMPLES = 1999
SMALLEST_POOL = 4
NO_VARIATION = 1e-12
"""Differences of this size, relative to the loss, are rounding."""
NO_ERROR = 1e-7
"""So are standard errors of this size, which come from differences of squares."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimated difference with its confidence interval; the bounds are NaN where the data support none."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Scores:
    """Losses of K settings with S seeds, and of each setting on D documents.

    The documents' part is None where they are unknown or too few.
    """

    losses: Array
    """(K, S), nats per token; NaN where there is no run."""
    document_nll: Array | None = None
    """(K, D), summed nats, the mean over the setting's seeds."""
    document_tokens: Array | None = None
    """(D,), tokens."""


@dataclass(frozen=True)
class Differences:
    """All paired differences of K settings, each (K, K); entry [k, j] is k minus j.

    Errors are standard errors in nats per token; they are NaN where the data hold none.
    """

    mean: Array
    seeds: npt.NDArray[np.int64]
    """Seeds that both have."""
    own_error: Array
    """From the spread of this pair's own differences over seeds; degrees of freedom: `seeds - 1`."""
    pooled_error: Array
    """The same, with the spread pooled over settings; never below `own_error`. For the confidence set."""
    pooled_freedom: int
    document_error: Array
    """From the spread over documents."""
    document_freedom: float


@dataclass(frozen=True)
class BestSet:
    """The setting with the lowest loss, and all that cannot be told from it."""

    best: int
    inside: npt.NDArray[np.bool_]
    """(K,)"""


def t_interval(values: Array, level: float = LEVEL) -> Interval:
    """Return the mean of independent values with Student's two-sided interval.

    Args:
        values: (S,), one paired difference a seed. One value alone has no interval.
        level: Coverage, in (0, 1).
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean) if half == 0 else Interval(mean, mean - half, mean + half)


def document_interval(
    difference: Array, tokens: Array, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the difference of two runs per token, with a bootstrap interval over documents.

    Whole documents are drawn with replacement, and the estimate is a ratio of sums. The bootstrap is studentized
    (bootstrap-t; Efron and Tibshirani 1993, section 12.5; Hall 1988, doi:10.1214/aos/1176350933): the percentile
    bootstrap is too narrow for some dozens of documents of unequal length. Below about 20 even this one is, so each
    bound is at least as far as that of Student's interval with the jackknife's error and Kish's number of documents.

    Args:
        difference: (D,) summed NLL of the first run minus that of the second, by document.
        tokens: (D,) tokens of each document.
        level: Coverage, in (0, 1).
        resamples: Number of draws.
        seed: Of the draws.
    """
    estimate = float(difference.sum() / tokens.sum())
    generator = np.random.default_rng(seed)
    difference, tokens = _at_most(MAX_CLUSTERS, difference, tokens, generator)
    count = len(tokens)
    if count < MIN_DOCUMENTS:
        return Interval(estimate)
    error = _ratio_errors(np.ones((1, count)), difference, tokens)[1][0]
    if error <= NO_VARIATION * max(1.0, abs(estimate)):
        return Interval(estimate)
    draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    ratios, errors = _ratio_errors(draws, difference, tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        pivots = np.where(errors > 0, (ratios - estimate) / errors, np.sign(ratios - estimate) * np.inf)
    low, high = np.quantile(np.nan_to_num(pivots), [(1 - level) / 2, (1 + level) / 2])
    student = stats.t.ppf((1 + level) / 2, _effective_freedom(tokens))
    return Interval(
        estimate, float(estimate - max(high, student) * error), float(estimate - min(low, -student) * error)
    )


def _at_most(limit: int, difference: Array, tokens: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Join documents at random into `limit` groups, which are as independent as they are and cheaper to redraw."""
    if len(tokens) <= limit:
        return difference, tokens
    groups = generator.permutation(len(tokens)) % limit
    return np.bincount(groups, difference).astype(np.float64), np.bincount(groups, tokens).astype(np.float64)


def _ratio_errors(counts: Array, difference: Array, tokens: Array) -> tuple[Array, Array]:
    """Ratios of sums and their standard errors, for documents taken `counts` (B, D) times.

    A document that holds the share h of all tokens pulls the ratio towards itself by that share; dividing its residual
    by 1 - h undoes that (the jackknife). Without it, one long document makes intervals too narrow.
    """
    documents = counts.shape[1]
    total = (counts @ tokens)[:, None]
    ratio = (counts @ difference)[:, None] / total
    residual = (difference - ratio * tokens) / np.maximum(total - tokens, tokens)
    errors = np.sqrt(documents / (documents - 1) * np.einsum("bd,bd->b", counts, residual**2))
    return ratio[:, 0], errors


def paired_differences(scores: Scores) -> Differences:
    """Return all paired differences with their standard errors from seeds and from documents."""
    known = np.isfinite(scores.losses)
    # Centred, so that the sums of squares below do not cancel.
    losses = np.where(known, scores.losses - np.nanmean(scores.losses), 0.0)
    shared = known.astype(np.int64) @ known.T.astype(np.int64)
    sums, squares = losses @ known.T, losses**2 @ known.T
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (sums - sums.T) / shared
        spread = np.maximum(squares + squares.T - 2 * losses @ losses.T - shared * mean**2, 0.0) / (shared - 1)
        own = _without_rounding(np.sqrt(np.where(shared > 1, spread, np.nan) / shared), scores)
        variance, freedom = _seed_variance(scores.losses)
        pooled = _without_rounding(np.sqrt(2 * variance / shared), scores)
    document_error, document_freedom = _document_errors(scores)
    return Differences(
        mean, shared, own, np.fmax(own, pooled) if freedom else own, freedom, document_error, document_freedom
    )


def _without_rounding(errors: Array, scores: Scores) -> Array:
    return np.where(errors < NO_ERROR * abs(float(np.nanmean(scores.losses))), 0.0, errors)


def _seed_variance(losses: Array) -> tuple[float, int]:
    """Mean square of what setting and seed do not explain, over the better half of settings, with its freedom.

    The worse half stays out: settings on the brink of diverging vary more than all others and would hide every
    difference. The choice looks at means alone, which under normal noise say nothing of the residuals.
    """
    count = min(len(losses), max(SMALLEST_POOL, math.ceil(len(losses) / 2)))
    better = losses[np.argsort(np.nanmean(losses, axis=1), kind="stable")[:count]]
    rows, columns = np.nonzero(np.isfinite(better))
    design = np.zeros((len(rows), better.shape[0] + better.shape[1]))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), better.shape[0] + columns] = 1
    values = better[rows, columns] - np.nanmean(better)
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(rows) - int(rank)
    return (float(np.sum((values - design @ effects) ** 2)) / freedom if freedom else math.nan), freedom


def _document_errors(scores: Scores) -> tuple[Array, float]:
    """Linearised standard errors of ratios of sums (K, K), with Kish's effective number of documents, less one."""
    settings = len(scores.losses)
    nll, tokens = scores.document_nll, scores.document_tokens
    if nll is None or tokens is None or len(tokens) < MIN_DOCUMENTS:
        return np.full((settings, settings), np.nan), 0.0
    total, count = tokens.sum(), len(tokens)
    # As in `_ratio_errors`: the share of a long document in its own expectation is taken out.
    residual = (nll - nll.sum(axis=1, keepdims=True) / total * tokens) / np.maximum(total - tokens, tokens)
    residual = residual - residual[:1]  # what all settings share cancels in differences; taken out for precision
    covariance = count / (count - 1) * residual @ residual.T
    variance = np.diag(covariance)
    errors = np.sqrt(np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0.0))
    return _without_rounding(errors, scores), _effective_freedom(tokens)


def _effective_freedom(tokens: Array) -> float:
    """Kish's effective number of documents, less one: few long ones among many short ones count as few."""
    return max(float(tokens.sum() ** 2 / np.sum(tokens**2)) - 1, 1.0)


def setting_interval(differences: Differences, first: int, second: int, level: float = LEVEL) -> Interval:
    """Return the difference of two settings, first minus second, with an interval for this pair alone.

    Its half-width joins that of Student's interval over per-seed paired differences and that of the documents as
    legs of a right triangle: the two noises are independent (the method of variance estimates recovery, Zou and Donner
    2008, doi:10.1002/sim.3095). A part that the data do not hold is left out; with neither there is no interval.
    """
    estimate = float(differences.mean[first, second])
    half = math.hypot(*interval_parts(differences, first, second, level))
    return Interval(estimate) if half == 0 else Interval(estimate, estimate - half, estimate + half)


def interval_parts(differences: Differences, first: int, second: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the half-widths of `setting_interval` that come from seeds and from documents; 0 for an unknown part."""
    share = (1 + level) / 2
    seeds, documents = int(differences.seeds[first, second]), differences.document_error[first, second]
    by_seeds = stats.t.ppf(share, seeds - 1) * differences.own_error[first, second] if seeds > 1 else 0.0
    known = math.isfinite(documents) and seeds > 0
    by_documents = stats.t.ppf(share, differences.document_freedom) * documents if known else 0.0
    return float(by_seeds), float(by_documents)


def equals_of_the_best(losses: Array, differences: Differences, level: float = LEVEL) -> BestSet | None:
    """Return the best setting and those that cannot be told from it, or None where no noise can be estimated.

    Multiple comparisons with the best (Hsu 1981, doi:10.1214/aos/1176345582; 1984, doi:10.1214/aos/1176346732; its
    upper half is Gupta's subset selection, 1965, doi:10.1080/00401706.1965.10490251): a setting stays unless some other
    is better by more than the one-sided quantile of Dunnett (1955, doi:10.1080/01621459.1955.10501294) allows. The
    truly best one is then inside with probability `level`, however many settings there are and however close they lie.

    Why not the model confidence set (Hansen, Lunde and Nason 2011, doi:10.3982/ECTA5771): its guarantee is
    asymptotic, and its bootstrap would redraw 2 to 5 seeds; drawn from two, half of all resamples have no spread.
    Under normal noise Dunnett's quantile is exact from two seeds on, because the spread is pooled over settings (seeds
    being blocks of a complete design). That assumes seed noise of similar size in the settings near the top. As a
    guard a pair's own spread counts where it is larger. The guard is not complete: of 13 equally good settings, a best
    one with three times the others' seed noise was inside in 0.88, 0.90 and 0.92 of simulations with 2, 3 and 5 seeds.

    Seeds and documents are joined as in `setting_interval`.

    Args:
        losses: (K, S), nats per token; NaN where there is no run.
        differences: Of the same settings.
        level: Probability that the truly best setting is inside, in (0, 1).
    """
    by_seeds = differences.pooled_error if differences.pooled_freedom else np.full_like(differences.mean, np.nan)
    if not (np.isfinite(by_seeds).any() or np.isfinite(differences.document_error).any()):
        return None
    seeds = one_sided_quantile(len(losses) - 1, differences.pooled_freedom, level) if differences.pooled_freedom else 0
    # Rounded down, which is the careful side and lets the cache of quantiles be hit.
    documents = one_sided_quantile(len(losses) - 1, math.floor(differences.document_freedom), level)
    half = np.hypot(np.nan_to_num(seeds * by_seeds), np.nan_to_num(documents * differences.document_error))
    tolerance = NO_VARIATION * max(1.0, float(np.nanmean(losses)))
    worse = (differences.mean > half + tolerance) & (differences.seeds > 0)
    inside: npt.NDArray[np.bool_] = np.logical_not(np.any(worse, axis=1))
    means = np.nanmean(losses, axis=1)
    best = int(np.argmin(np.where(inside, means, np.inf))) if inside.any() else int(np.argmin(means))
    inside[best] = True
    return BestSet(best, inside)


@lru_cache(maxsize=256)
def one_sided_quantile(comparisons: int, freedom: float, level: float) -> float:
    """Return Dunnett's one-sided quantile for equally many runs a setting (correlations of 1/2).

    It solves P(max_j (Z_j - Z_0) / sqrt(2) <= c * s) = level, with Z standard normal and s^2 * freedom chi-squared.

    Args:
        comparisons: Settings compared with one, >= 0.
        freedom: Degrees of freedom of the spread, > 0 (not above 10,000: beyond, nothing changes).
        level: Probability, in (0, 1).
    """
    if comparisons < 1 or freedom <= 0:
        return 0.0
    freedom = min(freedom, 10_000.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    shares, share_weights = np.polynomial.legendre.leggauss(200)
    spread = np.sqrt(stats.chi2.ppf((shares + 1) / 2, freedom) / freedom)

    def excess(quantile: float) -> float:
        below = stats.norm.cdf(nodes[None, :] + math.sqrt(2) * quantile * spread[:, None]) ** comparisons
        return float(share_weights @ (below @ weights)) / 2 - level

    return float(optimize.brentq(excess, 0.0, 1e5))
