"""The distillation loss from hidden states and head weights: the objective of `kd.losses`, without its logits.

A chunk of tokens at a time, loss and gradients are computed together in the forward pass (`kd.tiles` says how), so that
memory does not grow with the number of tokens; the backward pass only multiplies by the gradient that arrives.

Shape letters: B batch, L length, N tokens with a label, K vocabulary entries of a tile, C tokens of a chunk,
V vocabulary, H width of a model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.head_products import Sum, add_gradients
from kd.huge_pages import new_empty
from kd.labelled import labelled_rows, select_rows, spread_rows
from kd.tiles import Chunk, Head, Tiling, Workspace

CPU_TILING = Tiling(tokens=256, vocabulary=3072)
"""Of those measured, as fast as any on idle cores (a tile stays in the processor's cache). Smaller tiles mean more
meetings of the threads, and lose far more where other processes compete for the cores."""
ACCELERATOR_TILING = Tiling(tokens=1024, vocabulary=2**31)
"""A GPU has no cache to keep a tile in and pays for each kernel launch: the whole vocabulary at once."""


@dataclass(frozen=True)
class TokenScores:
    """What an evaluation sums up, at temperature 1; all in the shape of the labels, 0 or False where those are -100."""

    nll: Tensor
    """-log p(label) of the student, in nats; float32."""
    kl: Tensor | None
    """KL(teacher || student), in nats; float32. None without a teacher, as are the next two."""
    agreement: Tensor | None
    """Whether both models' largest logits are at the same token; bool."""
    teacher_nll: Tensor | None
    """-log p(label) of the teacher, in nats; float32."""


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 2.0,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `distillation_loss` of the logits `hidden @ weight.T + bias`, which are never all there at once.

    Positions with label -100 take part in nothing, not even in a matrix product. The student's products are computed in
    the dtype of autocast, where that is on, or else of the arguments, as the teacher's are in either case; softmax and
    sums in float32, or float64 for float64. The weight may belong to a tied embedding: its gradient adds to the
    embedding's.

    One backward pass only: it scales the gradients in place and gives them away. A second raises a RuntimeError.

    Args:
        student_hidden: (B, L, H) or (N, H), what the student's head sees.
        student_weight: (V, H) of the student's head.
        teacher_hidden: The same for the teacher, whose width may differ. No gradient reaches it. None, with
            `teacher_weight`, is allowed at alpha = 0 only, and saves the teacher's projection.
        teacher_weight: (V, width of the teacher).
        labels: (B, L) or (N,) next-token targets; -100 is ignored.
        alpha: weight of the distillation term, in [0, 1].
        temperature: T, finite and > 0.
        student_bias: (V,) of the student's head.
        teacher_bias: (V,) of the teacher's head. Entries of -inf have probability 0.
        teacher_softcap: bound b of the teacher's logits x, which are b * tanh(x / b) then; None: none.
        tiling: chunk and tile size; None: the one measured best for the device.

    Returns:
        The total, 0-d, and the detached 0-d float32 values `kl_loss` (its T^2 included), `ce_loss`, `total_loss`.
        Without a teacher there is no `kl_loss`.

    Raises:
        ValueError: if shapes differ, if alpha or temperature is out of range, if a label is not in the vocabulary, or
            if there is no teacher and alpha > 0.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2. Gradients computed in the forward pass, chunk by
        chunk: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2; a vocabulary in tiles that are never
        written out: Wijmans et al. 2024 (Cut Cross-Entropy), arXiv:2411.09009, section 4.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not allowed: the weight of the distillation term must be in [0, 1].")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} is not allowed: it must be a finite number greater than 0.")
    rows = labelled_rows(labels, student_weight)
    hidden = select_rows(student_hidden, student_weight, student_bias, labels, rows)
    teacher = _teacher_head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, labels, rows)
    if teacher is None and alpha > 0:
        raise ValueError(f"alpha={alpha} needs a teacher: give teacher_hidden and teacher_weight, or set alpha=0.")
    _check_same_vocabulary(student_weight, teacher)
    # Without a teacher the temperature has no part in anything, and 1 costs least.
    objective = _Objective(alpha, temperature if teacher is not None else 1.0, torch.is_grad_enabled())
    tiling = tiling or _default_tiling(labels.device)
    total, kl, cross_entropy = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
        hidden, student_weight, student_bias, teacher, labels.reshape(-1)[rows], objective, tiling
    )
    values = {"kl_loss": kl, "ce_loss": cross_entropy, "total_loss": total}
    if teacher is None:
        del values["kl_loss"]
    return total, {name: value.detach().float() for name, value in values.items()}


@torch.no_grad()
def linear_scores(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    tiling: Tiling | None = None,
) -> TokenScores:
    """Return each token's scores at temperature 1: `token_nll`, `token_kl`, `token_agreement`, without the logits.

    One pass, in which not even a chunk's logits are kept.

    Args: As for `linear_distillation_loss`.

    Raises:
        ValueError: if shapes differ, or if a label is not in the vocabulary.
    """
    rows = labelled_rows(labels, student_weight)
    hidden = select_rows(student_hidden, student_weight, student_bias, labels, rows)
    student = Head.of(hidden, student_weight, student_bias)
    teacher = _teacher_head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, labels, rows)
    _check_same_vocabulary(student_weight, teacher)
    tiling = tiling or _default_tiling(labels.device)
    with torch.autocast(labels.device.type, enabled=False):
        scores = _score_chunks(student, teacher, labels.reshape(-1)[rows], tiling)
    nll, kl, agreement, teacher_nll = (None if score is None else spread_rows(score, labels, rows) for score in scores)
    assert nll is not None
    return TokenScores(nll, kl, agreement, teacher_nll)


def _score_chunks(
    student: Head, teacher: Head | None, labels: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the fields of `TokenScores` for the labelled tokens, (N,) each."""
    workspace = Workspace(student, teacher is not None, tiling, keep_logits=False)
    nll = workspace.new_row(len(labels))
    kl, teacher_nll, agreement = (
        torch.zeros_like(nll),
        torch.zeros_like(nll),
        torch.zeros_like(labels, dtype=torch.bool),
    )
    for tokens in workspace.chunks(len(labels)):
        chunk = Chunk(student, teacher, labels, tokens, 1.0, workspace)
        nll[tokens] = chunk.nll()
        if teacher is not None:
            kl[tokens], agreement[tokens], teacher_nll[tokens] = chunk.kl(), chunk.agreement(), chunk.teacher_nll()
    return (nll, None, None, None) if teacher is None else (nll, kl, agreement, teacher_nll)


def _default_tiling(device: torch.device) -> Tiling:
    return CPU_TILING if device.type == "cpu" else ACCELERATOR_TILING


def _teacher_head(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    labels: Tensor,
    rows: Tensor,
) -> Head | None:
    """Return the teacher's head with the hidden states of the labelled tokens, outside of every graph.

    Autocast is the student's: with or without logits, and in an evaluation, the teacher says the same.
    """
    if hidden is None and weight is None:
        return None
    if hidden is None or weight is None:
        raise ValueError("Of teacher_hidden and teacher_weight only one was given: give both, or neither.")
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        return Head.of(select_rows(hidden, weight, bias, labels, rows), weight, bias, softcap)


def _check_same_vocabulary(student_weight: Tensor, teacher: Head | None) -> None:
    """Refuse distributions over different vocabularies."""
    if teacher is not None and teacher.weight.size(0) != student_weight.size(0):
        raise ValueError(
            f"The student's head has {student_weight.size(0)} rows and the teacher's {teacher.weight.size(0)}: their "
            "distributions cannot be compared. Give both the same vocabulary."
        )


@dataclass(frozen=True)
class _Objective:
    """What is minimised: alpha * T^2 * KL + (1 - alpha) * cross-entropy."""

    alpha: float
    temperature: float
    has_gradient: bool

    def blend(self, kl: Tensor, cross_entropy: Tensor) -> Tensor:
        """Return the weighted sum, in which a term of weight 0 is absent: 0 * inf would be NaN."""
        if self.alpha == 0:
            return cross_entropy.clone()
        if self.alpha == 1:
            return kl.clone()
        return self.alpha * kl + (1 - self.alpha) * cross_entropy


class _Gradients:
    """Gradients by hidden states (N, H), weight (V, H) and bias (V,), summed tile by tile; None where not needed."""

    def __init__(self, student: Head, dtype: torch.dtype, needed: tuple[bool, ...]) -> None:
        self._student = student
        # float16 has no room for gradients before GradScaler's factor, which arrives in the backward pass only.
        self._product_dtype = torch.float32 if student.weight.dtype == torch.float16 else student.weight.dtype
        self.hidden = new_empty(student.hidden, student.hidden.shape, dtype) if needed[0] else None
        self.weight = new_empty(student.weight, student.weight.shape, dtype) if needed[1] else None
        if len(student.hidden) == 0 and self.weight is not None:  # the first products overwrite, but there are none
            self.weight.zero_()
        self.bias = student.weight.new_zeros(student.weight.size(0), dtype=dtype) if needed[2] else None

    def add(self, tokens: slice, entries: slice, gradient: Tensor) -> None:
        """Add the products of a tile of the gradient by the logits, (K, C)."""
        self._add_products(tokens, entries, gradient.to(self._product_dtype))
        if self.bias is not None:
            self.bias[entries] += gradient.sum(dim=1)

    def _add_products(self, tokens: slice, entries: slice, gradient: Tensor) -> None:
        add_gradients(
            gradient,
            self._student.weight[entries].to(gradient.dtype),
            self._student.hidden[tokens].to(gradient.dtype),
            by_weight=None if self.weight is None else Sum(self.weight[entries], is_empty=tokens.start == 0),
            by_hidden=None if self.hidden is None else Sum(self.hidden[tokens], is_empty=entries.start == 0),
        )


def _walk(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    objective: _Objective,
    tiling: Tiling,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, _Gradients | None]:
    """Return the mean KL with its T^2 and the mean cross-entropy, 0-d, and the gradients of the objective."""
    workspace = Workspace(student, teacher is not None, tiling, keep_logits=any(needed))
    gradients = _Gradients(student, workspace.dtype, needed) if any(needed) else None
    count = max(1, len(labels))
    kl = torch.zeros((), dtype=torch.float64, device=labels.device)
    nll = torch.zeros_like(kl)
    for tokens in workspace.chunks(len(labels)):
        chunk = Chunk(student, teacher, labels, tokens, objective.temperature, workspace)
        nll += chunk.nll().sum()
        if teacher is not None:
            kl += chunk.kl().sum()
        if gradients is not None:
            for entries, tile in chunk.gradients(objective.alpha, count):
                gradients.add(tokens, entries, tile)
    return (kl * objective.temperature**2 / count).to(workspace.dtype), (nll / count).to(workspace.dtype), gradients


class _LinearDistillation(torch.autograd.Function):
    """Total, KL (with T^2) and cross-entropy of the labelled tokens; the gradients are ready when forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Head | None,
        labels: Tensor,
        objective: _Objective,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        needed = ctx.needs_input_grad[:3] if objective.has_gradient else (False, False, False)
        # Autocast would change the dtypes of products and sums, which are chosen here one by one.
        student = Head.of(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            kl, nll, ctx.gradients = _walk(student, teacher, labels, objective, tiling, needed)
        ctx.mark_non_differentiable(kl, nll)
        return objective.blend(kl, nll), kl, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_distillation_loss was already differentiated, and its gradients were given away then: call it "
                "again for a second backward pass (retain_graph=True does not help)."
            )
        gradients: _Gradients = ctx.gradients
        ctx.gradients = None
        # In place: a copy of the head's gradient would be the largest tensor of the whole step.
        parts = list(zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True))
        if grad_total.device.type != "cpu" or float(grad_total) != 1:  # a GPU would have to be waited for
            parts = [(None if part is None else part.mul_(grad_total), dtype) for part, dtype in parts]
        scaled = (None if part is None else part.to(dtype) for part, dtype in parts)
        return *scaled, None, None, None, None
