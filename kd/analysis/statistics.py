"""What the numbers can tell: intervals, and the set of settings that cannot be told from the best. Arrays only.

Two sources of noise stand between a table of losses and an answer. Another seed gives another student, and another
text favours another setting. Both are crossed with the settings: every setting sees the same seeds (initial weights,
data order) and is scored on the same documents, so what a seed or a document adds to all settings alike cancels in
differences, and only what it adds to one more than to another is noise. Blocks of one document are not independent;
documents are the units.

Losses are nats per token throughout.
"""

import math
import warnings
from collections.abc import Sequence
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

    Errors are standard errors in the unit of the losses; they are NaN where the data hold none.
    """

    mean: Array
    lowest: Array
    """Of the seeds that both have."""
    highest: Array
    seeds: npt.NDArray[np.int64]
    """Seeds that both have."""
    own_error: Array
    """From the spread of this pair's own differences over seeds; degrees of freedom: `seeds - 1`."""
    pooled_error: Array
    """The same, with the spread pooled over settings."""
    pooled_freedom: int
    document_error: Array
    """From the spread over documents."""
    document_freedom: float


@dataclass(frozen=True)
class Bounds:
    """Simultaneous confidence bounds of all differences of K settings, each (K, K); NaN where there are none."""

    low: Array
    high: Array


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


def paired_differences(scores: Scores, pools: Sequence[Sequence[int]] = ()) -> Differences:
    """Return all paired differences with their standard errors from seeds and from documents.

    Args:
        scores: Of K settings.
        pools: Settings (by number) whose better half each the seeds' spread is pooled over; all of them if empty.
    """
    known = np.isfinite(scores.losses)
    each = scores.losses[:, None, :] - scores.losses[None, :, :]
    shared = (known[:, None, :] & known[None, :, :]).sum(axis=2)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's of pairs without a common seed, which are NaN
        mean, lowest, highest = (function(each, axis=2) for function in (np.nanmean, np.nanmin, np.nanmax))
        spread = np.nansum((each - mean[:, :, None]) ** 2, axis=2) / (shared - 1)
        own = _without_rounding(np.sqrt(np.where(shared > 1, spread, np.nan) / shared), scores)
        variance, freedom = _seed_variance(scores.losses, pools or [range(len(scores.losses))])
        pooled = _without_rounding(np.sqrt(2 * variance / shared), scores)
    return Differences(mean, lowest, highest, shared, own, pooled, freedom, *_document_errors(scores))


def _without_rounding(errors: Array, scores: Scores) -> Array:
    return np.where(errors < NO_ERROR * abs(float(np.nanmean(scores.losses))), 0.0, errors)


def _seed_variance(losses: Array, pools: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Mean square of what setting and seed do not explain, over the better half of each pool, with its freedom.

    The worse half stays out: settings on the brink of diverging vary more than all others and would hide every
    difference. The choice looks at means alone, which under normal noise say nothing of the residuals.
    """
    better = losses[[row for pool in pools for row in _better_half(losses, pool, len(pools))]]
    rows, columns = np.nonzero(np.isfinite(better))
    design = np.zeros((len(rows), better.shape[0] + better.shape[1]))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), better.shape[0] + columns] = 1
    values = better[rows, columns] - np.nanmean(better)
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(rows) - int(rank)
    return (float(np.sum((values - design @ effects) ** 2)) / freedom if freedom else math.nan), freedom


def _better_half(losses: Array, pool: Sequence[int], num_pools: int) -> Sequence[int]:
    count = max(math.ceil(SMALLEST_POOL / num_pools), math.ceil(len(pool) / 2))
    return sorted(pool, key=lambda row: float(np.nanmean(losses[row])))[:count]


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


def simultaneous_bounds(differences: Differences, num_arms: int, level: float = LEVEL) -> Bounds:
    """Return bounds of all differences between settings that hold together with probability `level`.

    Where each setting is an arm of its own these are the intervals of Tukey (1953) and Kramer (1956,
    doi:10.2307/3001469), on paired differences: seeds are the blocks of a complete design, and the spread is pooled
    over settings. They hold for every pair at once, so also for the pair that was picked for looking best. Where an arm
    is a group of settings of which the best is taken, `arm_interval` needs less: see `range_quantile`.

    Seeds and documents are joined as legs of a right triangle: the two noises are independent (the method of variance
    estimates recovery, Zou and Donner 2008, doi:10.1002/sim.3095). A part that the data do not hold is left out, but
    without a spread over seeds there are no bounds: another seed might turn everything round.

    Pooling assumes seed noise of similar size in all settings. As a guard a pair's own spread counts where it is
    larger, though towards 0 no further than to the pair's own smallest difference, by which even a setting on the brink
    of diverging is seen to be worse when it is so at every seed. The guard is not complete with two or three seeds;
    `kd.analysis.soundness` says so where one setting's seeds vary far more than the others'.

    Args:
        differences: Of K settings.
        num_arms: Groups that the settings fall into; K if each is compared for itself.
        level: Probability that all bounds hold, in (0, 1).
    """
    nothing = np.full_like(differences.mean, np.nan)
    if not differences.pooled_freedom:
        return Bounds(nothing, nothing)
    settings, pooled = len(differences.mean), differences.pooled_error
    seeds = range_quantile(num_arms, settings, differences.pooled_freedom, level)
    # Rounded down, which is the careful side and lets the cache of quantiles be hit.
    documents = range_quantile(num_arms, settings, math.floor(differences.document_freedom), level)
    by_documents = np.nan_to_num(documents * differences.document_error)
    half = np.hypot(seeds * np.fmax(differences.own_error, pooled), by_documents)
    beyond_range = np.hypot(seeds * pooled, by_documents)
    low, high = differences.mean - half, differences.mean + half
    low = np.where(differences.mean > 0, np.fmax(low, differences.lowest - beyond_range), low)
    high = np.where(differences.mean < 0, np.fmin(high, differences.highest + beyond_range), high)
    known = (half > 0) & (differences.seeds > 0)
    return Bounds(np.where(known, low, np.nan), np.where(known, high, np.nan))


@dataclass(frozen=True)
class Arm:
    """Settings of which the best counts, and the one of them that was chosen."""

    chosen: int
    members: Sequence[int]
    """Its settings, the chosen one among them."""


def arm_interval(differences: Differences, bounds: Bounds, first: Arm, second: Arm) -> Interval:
    """Return the difference of two arms, each at its truly best setting, with an interval that counts the choice.

    An arm's loss is that of its truly best setting m, min_m mu_m. Whichever was chosen, the truth is no larger than the
    chosen one's, and no smaller than that of the best of all members. So with bounds that hold together
    min_n(low[n, c2]) <= min_n(mu_n) - min_m(mu_m) <= max_m(high[c1, m]), with n over the first arm, m over the second
    and c the chosen ones: however lucky the chosen one was, its luck is inside (the projection of a joint confidence
    set; Berk et al. 2013, doi:10.1214/12-AOS1077, do the same for all choices of a model). `estimate` is the difference
    of the chosen ones. For arms of one setting this is its simultaneous interval.
    """
    estimate = float(differences.mean[first.chosen, second.chosen])
    low = float(np.min(bounds.low[list(first.members), second.chosen]))
    high = float(np.max(bounds.high[first.chosen, list(second.members)]))
    return Interval(estimate, low, high) if math.isfinite(low) and math.isfinite(high) else Interval(estimate)


@lru_cache(maxsize=256)
def range_quantile(num_arms: int, num_settings: int, freedom: float, level: float) -> float:
    """Return the quantile of the range from the truth of each arm to any setting, in standard errors of a difference.

    It solves P(max_k Z_k - min_a Z_a <= sqrt(2) * c * s) = level, with Z standard normal, k over all settings, a over
    one of each arm, and s^2 * freedom chi-squared. With as many arms as settings it is the studentized range's (Tukey),
    over sqrt(2); with one arm Dunnett's one-sided one (1955, doi:10.1080/01621459.1955.10501294), which Hsu's
    comparisons with the best use (1984, doi:10.1214/aos/1176346732); in between, what `arm_interval` needs: its bounds
    compare the truly best setting of an arm, which is one, with any setting that may be chosen.

    Args:
        num_arms: 1 to `num_settings`.
        num_settings: Settings in all.
        freedom: Degrees of freedom of the spread, > 0 (not above 10,000: beyond, nothing changes).
        level: Probability, in (0, 1).
    """
    if num_settings < 2 or freedom <= 0:
        return 0.0
    freedom = min(freedom, 10_000.0)
    lowest, weights = np.polynomial.legendre.leggauss(160)
    lowest = 8.5 * lowest  # beyond, the density is nothing
    density = weights * 8.5 * num_arms * stats.norm.pdf(lowest)
    shares, share_weights = np.polynomial.legendre.leggauss(200)
    spread = np.sqrt(stats.chi2.ppf((shares + 1) / 2, freedom) / freedom)

    def excess(quantile: float) -> float:
        below = stats.norm.cdf(lowest + math.sqrt(2) * quantile * spread[:, None])
        inside = (below - stats.norm.cdf(lowest)) ** (num_arms - 1) * below ** (num_settings - num_arms)
        return float(share_weights @ (inside @ density)) / 2 - level

    return float(optimize.brentq(excess, 0.0, 1e5))
