"""Losses on logits, as pure functions. Plain on purpose: whatever computes them faster is tested against these.

Labels are next-token targets already: `labels[..., i]` is the target of `logits[..., i, :]`, and nothing here shifts.
Everything is computed in float32, or in float64 where the logits have it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that takes no part in any loss."""


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float = 0.5, temperature: float = 2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return alpha * T^2 * KL(teacher/T || student/T) + (1 - alpha) * cross-entropy(student, labels).

    Both terms are means over the valid positions, in nats; 0, with a graph, if there is none. The KL is the true one,
    the teacher's entropy included, and no gradient reaches the teacher. At alpha = 0 the total is the cross-entropy
    and nothing else, at alpha = 1 the KL; the other term is then reported, but computed without gradients.

    Args:
        student_logits: (B, L, V), any floating dtype.
        teacher_logits: (B, L, V), any floating dtype. Entries of -inf have probability 0.
        labels: (B, L) next-token targets; -100 is ignored, whatever the teacher's logits are there.
        alpha: weight of the distillation term, in [0, 1].
        temperature: T, finite and > 0.

    Returns:
        The total, 0-d, and the detached 0-d float32 values `kl_loss` (its T^2 included), `ce_loss`, `total_loss`.

    Raises:
        ValueError: if shapes differ, or if alpha or temperature is out of range.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """
    _check_same_shape(student_logits, teacher_logits)
    _check_labels(student_logits, labels)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not allowed: the weight of the distillation term must be in [0, 1].")
    ignored = labels == IGNORE_INDEX
    with torch.set_grad_enabled(torch.is_grad_enabled() and alpha > 0):
        # A teacher may give NaN at padding; 0 * NaN would carry it into the student's gradient.
        teacher = teacher_logits.detach().masked_fill(ignored.unsqueeze(-1), 0.0)
        divergences = token_kl(student_logits, teacher, temperature).masked_fill(ignored, 0.0)
        kl = temperature**2 * divergences.sum() / _count_valid(labels)
    with torch.set_grad_enabled(torch.is_grad_enabled() and alpha < 1):
        cross_entropy = causal_lm_loss(student_logits, labels)
    total = _blend(kl, cross_entropy, alpha)
    values = {"kl_loss": kl, "ce_loss": cross_entropy, "total_loss": total}
    return total, {name: value.detach().float() for name, value in values.items()}


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the valid positions, 0-d, in nats; 0, with a graph, if there is none.

    Args:
        logits: (..., V), any floating dtype.
        labels: (...) next-token targets; -100 is ignored.

    Raises:
        ValueError: if the labels do not have the shape of the logits without V.
    """
    return _cross_entropy(logits, labels, "sum") / _count_valid(labels)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) of each position, in nats; 0 where the label is -100.

    Args:
        logits: (..., V), any floating dtype.
        labels: (...) next-token targets.

    Returns:
        (...), float32 (float64 for float64 logits).

    Raises:
        ValueError: if the labels do not have the shape of the logits without V.
    """
    return _cross_entropy(logits, labels, "none").view(labels.shape)


def token_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher/T || student/T) of each position, in nats; without the T^2, >= 0 up to rounding.

    No gradient reaches the teacher. Where the teacher's probability is 0, the student's logit does not matter.

    Args:
        student_logits: (..., V), any floating dtype.
        teacher_logits: (..., V), any floating dtype.
        temperature: T, finite and > 0.

    Returns:
        (...), float32 (float64 for float64 logits).

    Raises:
        ValueError: if the shapes differ, or if the temperature is out of range.
    """
    _check_same_shape(student_logits, teacher_logits)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} is not allowed: it must be a finite number greater than 0.")
    student = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(_at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    probabilities = teacher.exp()
    # 0 * (-inf - x) is NaN, where the limit of p log p is 0.
    log_ratio = (teacher - student).masked_fill(probabilities == 0, 0.0)
    return (probabilities * log_ratio).sum(dim=-1)


def token_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return, as bool (...), where both logits (..., V) have their largest entry at the same token.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_same_shape(student_logits, teacher_logits)
    return student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Return the cross-entropy of all positions, flattened or summed; ignored ones add 0."""
    _check_labels(logits, labels)
    flat = _at_least_float32(logits).reshape(-1, logits.size(-1))
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction=reduction)


def _count_valid(labels: Tensor) -> Tensor:
    """Return the number of valid positions, at least 1, as a 0-d tensor: reading it out would stall a GPU."""
    return (labels != IGNORE_INDEX).sum().clamp_min(1)


def _blend(kl: Tensor, cross_entropy: Tensor, alpha: float) -> Tensor:
    """Return the weighted sum, in which a term of weight 0 is absent: 0 * inf would be NaN."""
    if alpha == 0:
        return cross_entropy
    if alpha == 1:
        return kl
    return alpha * kl + (1 - alpha) * cross_entropy


def _at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits over different positions or vocabularies."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ in "
            "shape and cannot be compared: give both models the same tokens and the same vocabulary."
        )


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that do not stand one to one with positions."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}: there must be one next-token "
            "target for each position, already shifted."
        )
