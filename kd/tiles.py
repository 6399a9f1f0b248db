"""A walk through the vocabulary in tiles: what `kd.linear_distillation` computes for one chunk of tokens.

A chunk walks twice. The first pass projects both models' hidden states and sums the exponentials of the logits; the
second turns each tile into a tile of the gradient. All element-wise work on a tile is done while it is in the
processor's cache.

An exponential costs as much as ten products. The teacher's are kept in place of its logits; and where the temperature
is a power of two the student's are too, since exp(x) is then exp(x / T) squared a few times: that saves three of five.

Tiles are (vocabulary, tokens), not the other way round: the projection `weight @ hidden.T` then reads both operands as
they lie in memory, which on a CPU is 10 to 15 % faster, and every per-token factor is a contiguous row.

Shape letters: N tokens, C of them in a chunk, V vocabulary, K of it in a tile, H width of a model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.head_products import project
from kd.huge_pages import new_empty

MOST_SQUARINGS = 4
LOWEST_LOGIT = -1e30
"""Stands for a logit of -inf (from a head bias): its probability is 0 too, and 0 times it is not NaN."""


@dataclass(frozen=True)
class Tiling:
    """How much is worked on at a time; it changes speed and memory, and results by rounding only.

    Two float32 matrices of `tokens` x V are held, and two of `tokens` x `vocabulary`.
    """

    tokens: int
    """Most tokens of a chunk, at least 1."""
    vocabulary: int
    """Most vocabulary entries of a tile, at least 1."""

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("vocabulary", self.vocabulary)):
            if value < 1:
                raise ValueError(f"Tiling.{name}={value} is not allowed: it must be at least 1.")


@dataclass(frozen=True)
class Head:
    """Hidden states and the head that projects them, all in the dtype of the products."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None = None
    """Logits are softcap * tanh(logits / softcap); the gradients here do not know of it: for a teacher only."""

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None) -> "Head":
        """Return a head in the dtype that `F.linear` would compute in: autocast's, if that is on."""
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), softcap)

    def project(self, tokens: slice, entries: slice, out: Tensor) -> None:
        """Write the logits of some tokens at some vocabulary entries, (K, C), rounded to the head's dtype."""
        weight, hidden = self.weight[entries], self.hidden[tokens]
        if self.bias is not None:
            out.copy_(torch.addmm(self.bias[entries].unsqueeze(1), weight, hidden.T)).clamp_(min=LOWEST_LOGIT)
        elif out.dtype == weight.dtype:
            project(weight, hidden, out)
        else:
            out.copy_(torch.mm(weight, hidden.T))
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)


class Workspace:
    """Memory that all chunks share, taken once; and how tokens and vocabulary are cut.

    Args:
        student: gives sizes and the dtype: at least float32.
        has_teacher: whether to hold a teacher's logits too.
        tiling: largest chunk and tile.
        keep_logits: hold the logits of all tiles of a chunk (for gradients), not only of the present one.
    """

    def __init__(self, student: Head, has_teacher: bool, tiling: Tiling, keep_logits: bool) -> None:
        num_tokens, self._size = student.hidden.size(0), student.weight.size(0)
        # Chunks of about equal size, so that the last is no small one; 16 columns fill a vector register.
        even = math.ceil(num_tokens / max(1, math.ceil(num_tokens / tiling.tokens)))
        self._num_tokens = max(1, min(tiling.tokens, math.ceil(even / 16) * 16))
        self._num_entries = min(tiling.vocabulary, self._size)
        self.keep_logits = keep_logits
        self.dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        tile = min(self._num_tokens, num_tokens) * self._num_entries
        held = min(self._num_tokens, num_tokens) * self._size if keep_logits else tile
        self._student = new_empty(student.hidden, (held,), self.dtype)
        self._teacher = new_empty(student.hidden, (held if has_teacher else 0,), self.dtype)
        self._scratch = student.hidden.new_empty((2, tile), dtype=self.dtype)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Give the chunks of this many tokens."""
        for start in range(0, num_tokens, self._num_tokens):
            yield slice(start, min(start + self._num_tokens, num_tokens))

    def tiles(self) -> Iterator[slice]:
        """Give the tiles of the vocabulary."""
        for start in range(0, self._size, self._num_entries):
            yield slice(start, min(start + self._num_entries, self._size))

    def new_row(self, num_tokens: int) -> Tensor:
        """Return a zero for each token, (C,)."""
        return self._scratch.new_zeros(num_tokens)

    def new_rows(self, num_tokens: int) -> Tensor:
        """Return zeros for each tile, (tiles, C)."""
        return self._scratch.new_zeros(math.ceil(self._size / self._num_entries), num_tokens)

    def student(self, entries: slice, num_tokens: int) -> Tensor:
        """Return the place of the student's logits of a tile, (K, C)."""
        return self._place(self._student, entries, num_tokens)

    def teacher(self, entries: slice, num_tokens: int) -> Tensor:
        """Return the place of the teacher's logits of a tile, (K, C)."""
        return self._place(self._teacher, entries, num_tokens)

    def _place(self, held: Tensor, entries: slice, num_tokens: int) -> Tensor:
        first = entries.start if self.keep_logits else 0
        last = first + entries.stop - entries.start
        return held[first * num_tokens : last * num_tokens].view(-1, num_tokens)

    def scratch(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return two scratch tiles of the shape of another tile."""
        first, second = self._scratch[:, : like.numel()]
        return first.view(like.shape), second.view(like.shape)


class LogSumExp:
    """log sum_v exp(x_v / T) of each token, summed tile by tile; each tile relative to its own largest entry.

    Sums have their place from the beginning: small tensors that came one by one, and stayed, would leave no gap in the
    heap where the next tile's product fits (a quarter more memory, measured).

    Args:
        temperature: T.
        rows: zeros, (tiles, C).
    """

    def __init__(self, temperature: float, rows: Tensor) -> None:
        self.scale = 1 / temperature
        self._peaks = torch.zeros_like(rows)
        self._sums = torch.zeros_like(rows)
        self._tops = torch.zeros_like(rows, dtype=torch.long)
        self._value: Tensor | None = None

    def add(self, tile: int, logits: Tensor, peak: Tensor, top: Tensor | None, out: Tensor) -> None:
        """Take in a tile (K, C), its largest values (C,) and, if known, the vocabulary entries they are at.

        exp((x - peak) / T) stays in `out`, which may be `logits`.
        """
        torch.mul(peak, self.scale, out=self._peaks[tile])
        torch.add(-self._peaks[tile], logits, alpha=self.scale, out=out).exp_()
        torch.sum(out, dim=0, out=self._sums[tile])
        if top is not None:
            self._tops[tile] = top

    def add_exponentials(self, tile: int, exponentials: Tensor, peak: Tensor) -> None:
        """Take in a tile (K, C) of exp(x - peak), for its largest values (C,)."""
        self._peaks[tile] = peak
        torch.sum(exponentials, dim=0, out=self._sums[tile])

    def value(self) -> Tensor:
        """Return the result over all tiles, (C,), float64.

        The KL is a small difference of two such values, and at a high temperature T^2 of it counts: float32, which
        rounds a value of log V by eps * log V, would be off by more than the exponentials are.
        """
        if self._value is None:
            self._value = (self._peaks.double() + self._sums.double().log()).logsumexp(dim=0)
        return self._value

    def tile_factors(self) -> Tensor:
        """Return what the exponentials of each tile must be multiplied by to be probabilities, (tiles, C), float64."""
        return (self._peaks - self.value()).exp()

    def top(self) -> Tensor:
        """Return the vocabulary entry of the largest logit, (C,); the first of equal ones, as argmax does."""
        tile = self._peaks.argmax(dim=0, keepdim=True)
        return self._tops.gather(0, tile).squeeze(0)


class Chunk:
    """A chunk of tokens on its walk through the vocabulary; making it is the first pass.

    Args:
        student: the student's hidden states and head.
        teacher: the teacher's, or None.
        labels: (N,) of all tokens.
        tokens: which of them are the chunk's.
        temperature: T of the KL.
        workspace: memory, which the next chunk overwrites.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        labels: Tensor,
        tokens: slice,
        temperature: float,
        workspace: Workspace,
    ) -> None:
        self.tokens = tokens
        self.labels = labels[tokens]  # (C,)
        self.temperature = temperature
        self._gaps = workspace.new_rows(len(self.labels))
        self.hard = LogSumExp(1.0, self._gaps)
        self.soft = self.hard if temperature == 1 else LogSumExp(temperature, self._gaps)
        self.teacher_soft = LogSumExp(temperature, self._gaps)
        self._squarings = squarings(temperature)
        self._columns = torch.arange(len(self.labels), device=labels.device)
        self._workspace = workspace
        self._label_logit = self._teacher_label_logit = workspace.new_row(len(self.labels))
        for tile, entries in enumerate(workspace.tiles()):
            self._measure(student, teacher, tile, entries)

    def _measure(self, student: Head, teacher: Head | None, tile: int, entries: slice) -> None:
        """Project a tile, and take in what the loss needs of it."""
        logits = self._workspace.student(entries, len(self.labels))
        student.project(self.tokens, entries, logits)
        self._label_logit = self._at_labels(logits, entries, self._label_logit)
        peak, top = self._peak(logits, entries)
        if teacher is not None:
            self._measure_teacher(teacher, tile, entries, logits)
        self._sum_exponentials(tile, logits, peak, top)

    def _sum_exponentials(self, tile: int, logits: Tensor, peak: Tensor, top: Tensor | None) -> None:
        """Sum the student's exponentials; where squares give those of temperature 1, they replace the logits."""
        scratch, _ = self._workspace.scratch(logits)
        if self._squarings is None:
            self.hard.add(tile, logits, peak, top, scratch)
            self.soft.add(tile, logits, peak, top, scratch)
            return
        self.soft.add(tile, logits, peak, top, logits)
        if self._squarings:
            self.hard.add_exponentials(tile, _squared(logits, self._squarings, scratch), peak)

    def _measure_teacher(self, teacher: Head, tile: int, entries: slice, student_logits: Tensor) -> None:
        """Do the same for the teacher; its exponentials then replace its logits, which nothing needs any more."""
        logits = self._workspace.teacher(entries, len(self.labels))
        _, gap = self._workspace.scratch(logits)
        teacher.project(self.tokens, entries, logits)
        if not self._workspace.keep_logits:  # evaluations alone ask for it
            self._teacher_label_logit = self._at_labels(logits, entries, self._teacher_label_logit)
        torch.sub(logits, student_logits, out=gap)
        peak, top = self._peak(logits, entries)
        self.teacher_soft.add(tile, logits, peak, top, logits)
        torch.sum(gap.mul_(logits), dim=0, out=self._gaps[tile])

    def _peak(self, logits: Tensor, entries: slice) -> tuple[Tensor, Tensor | None]:
        """Return each token's largest logit in a tile, and the vocabulary entry it is at, (C,) each.

        Finding out where costs several times as much as finding the value, so it is left out where it has no use.
        """
        if self._workspace.keep_logits:
            return logits.amax(dim=0), None
        peak, rows = logits.max(dim=0)
        return peak, rows + entries.start

    def _label_rows(self, entries: slice) -> tuple[Tensor, Tensor]:
        """Return which labels (C,) are in a tile, and their rows there; any row of the tile for the others.

        No boolean index, whose size a GPU would have to report before work goes on.
        """
        inside = (self.labels >= entries.start) & (self.labels < entries.stop)
        return inside, (self.labels - entries.start).clamp(0, entries.stop - entries.start - 1)

    def _at_labels(self, logits: Tensor, entries: slice, so_far: Tensor) -> Tensor:
        """Return the logits (C,) at the labels, as far as they are known with this tile."""
        inside, rows = self._label_rows(entries)
        return torch.where(inside, logits[rows, self._columns], so_far)

    def nll(self) -> Tensor:
        """Return the student's -log p(label) at temperature 1, (C,), float64."""
        return self.hard.value() - self._label_logit

    def teacher_nll(self) -> Tensor:
        """Return the teacher's -log p(label) at the chunk's temperature, (C,), float64; only if logits are not kept."""
        return self.teacher_soft.value() - self._teacher_label_logit / self.temperature

    def agreement(self) -> Tensor:
        """Return whether both models' largest logits are at the same entry, (C,); only if logits are not kept."""
        return self.soft.top() == self.teacher_soft.top()

    def kl(self) -> Tensor:
        """Return KL(teacher/T || student/T), (C,), float64, in nats, without the T^2.

        The teacher's mean of (t - s)/T, less the difference of the two log-sum-exps.
        """
        gap = (self._gaps * self.teacher_soft.tile_factors()).sum(dim=0)
        return gap / self.temperature - self.teacher_soft.value() + self.soft.value()

    def gradients(self, alpha: float, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Second pass: give tile by tile the gradient by the student's logits, (K, C); each overwrites the last.

        Of (alpha * T^2 * KL + (1 - alpha) * cross-entropy) / count, with p, q the teacher's and the student's
        probabilities: (alpha * T * (q_T - p_T) + (1 - alpha) * (q_1 - onehot)) / count. Nothing is computed for a
        weight of 0.
        """
        soft, hard = alpha * self.temperature / count, (1 - alpha) / count
        terms = [(self.hard, soft + hard)] if self.soft is self.hard else [(self.soft, soft), (self.hard, hard)]
        terms = [(sums, weight) for sums, weight in terms if weight > 0]
        student = self._from_logits(terms) if self._squarings is None else self._from_exponentials(terms)
        factors = (self.teacher_soft.tile_factors() * -soft).to(self._gaps.dtype) if soft > 0 else None
        for index, (entries, gradient) in enumerate(student):
            if factors is not None:
                gradient.addcmul_(self._workspace.teacher(entries, len(self.labels)), factors[index])
            inside, rows = self._label_rows(entries)
            gradient[rows, self._columns] -= inside.to(gradient.dtype) * hard
            yield entries, gradient

    def _from_logits(self, terms: list[tuple[LogSumExp, float]]) -> Iterator[tuple[slice, Tensor]]:
        """Give tile by tile the weighted sum of the student's probabilities, (K, C)."""
        # The factors of a token go into the exponents.
        offsets = [(sums.scale, (math.log(weight) - sums.value()).to(self._gaps.dtype)) for sums, weight in terms]
        for entries in self._workspace.tiles():
            logits = self._workspace.student(entries, len(self.labels))
            total, term = self._workspace.scratch(logits)
            for index, (scale, offset) in enumerate(offsets):
                torch.add(offset, logits, alpha=scale, out=term if index else total).exp_()
                if index:
                    total.add_(term)
            yield entries, total

    def _from_exponentials(self, terms: list[tuple[LogSumExp, float]]) -> Iterator[tuple[slice, Tensor]]:
        """Give the same from exponentials that are there already."""
        factors = [(sums is self.soft, (sums.tile_factors() * weight).to(self._gaps.dtype)) for sums, weight in terms]
        for index, entries in enumerate(self._workspace.tiles()):
            exponentials = self._workspace.student(entries, len(self.labels))
            total, power = self._workspace.scratch(exponentials)
            for number, (is_soft, factor) in enumerate(factors):
                term = exponentials if is_soft else _squared(exponentials, self._squarings or 0, power)
                if number:
                    total.addcmul_(term, factor[index])
                else:
                    torch.mul(term, factor[index], out=total)
            yield entries, total


def squarings(temperature: float) -> int | None:
    """Return how often exp(x / temperature) must be squared to give exp(x); None if no (small) number does it."""
    mantissa, exponent = math.frexp(temperature)
    count = exponent - 1
    return count if mantissa == 0.5 and 0 <= count <= MOST_SQUARINGS else None


def _squared(values: Tensor, times: int, out: Tensor) -> Tensor:
    """Write values ** (2 ** times) to `out`, times > 0, and return it."""
    torch.mul(values, values, out=out)
    for _ in range(times - 1):
        out.mul_(out)
    return out
