"""Our losses and our trainer against independent implementations: Liger-Kernel's loss, TRL's loss and its trainer.

They are an extra, `pip install -e ".[bench]"`. Without it these tests are skipped, unless KD_REQUIRE_PEERS=1 is set.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.config import ModelConfig, TrainingConfig
from kd.linear_distillation import linear_distillation_loss
from kd.losses import IGNORE_INDEX, distillation_loss
from kd.model import StudentModel
from kd.tiles import Tiling
from kd.trainers import DistillationTrainer
from kd.trainers.state import Batch

from .llama import make_llama

BENCHMARKS = Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"
BATCH, LENGTH, VOCAB, WIDTH, TEACHER_WIDTH = 3, 11, 61, 12, 20
ALPHAS = (0.0, 0.3, 1.0)
TEMPERATURES = (0.5, 1.0, 4.0)
LOSSES = pytest.mark.parametrize("ours", ["distillation_loss", "linear_distillation_loss"])


def peer(module: str) -> Any:
    """Import a peer; skip the test where it is not installed, unless it must be."""
    if os.environ.get("KD_REQUIRE_PEERS") == "1":
        return importlib.import_module(module)
    return pytest.importorskip(module, reason="the extra [bench] is not installed", exc_type=ImportError)


@dataclass
class Problem:
    """One loss's hidden states (B, L, width), head weights (V, width) and labels (B, L)."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def logits(self) -> tuple[Tensor, Tensor]:
        return F.linear(self.hidden, self.weight), F.linear(self.teacher_hidden, self.teacher_weight)

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.hidden.flatten(0, 1),
            self.weight,
            self.teacher_hidden.flatten(0, 1),
            self.teacher_weight,
            self.labels.flatten(),
        )


def make_problem(masked: int = 9) -> Problem:
    """Return inputs whose logits have a standard deviation of about 3; `masked` labels are ignored."""
    torch.manual_seed(3)
    labels = torch.randint(VOCAB, (BATCH, LENGTH))
    labels.view(-1)[torch.randperm(labels.numel())[:masked]] = IGNORE_INDEX
    return Problem(
        torch.randn(BATCH, LENGTH, WIDTH).requires_grad_(),
        (3 * WIDTH**-0.5 * torch.randn(VOCAB, WIDTH)).requires_grad_(),
        torch.randn(BATCH, LENGTH, TEACHER_WIDTH),
        3 * TEACHER_WIDTH**-0.5 * torch.randn(VOCAB, TEACHER_WIDTH),
        labels,
    )


def our_loss(name: str, problem: Problem, alpha: float, temperature: float) -> Tensor:
    if name == "distillation_loss":
        return distillation_loss(*problem.logits(), problem.labels, alpha, temperature)[0]
    return linear_distillation_loss(*problem.flat(), alpha, temperature, tiling=Tiling(5, 16))[0]


def value_and_gradients(loss: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(problem)
    by_hidden, by_weight = torch.autograd.grad(value, (problem.hidden, problem.weight))
    return value.detach(), by_hidden, by_weight


def assert_same(ours: Callable[[Problem], Tensor], theirs: Callable[[Problem], Tensor], problem: Problem) -> None:
    """Compare to float32 rounding: of the terms of a gradient, some cancel."""
    expected = value_and_gradients(theirs, problem)
    for found, wanted in zip(value_and_gradients(ours, problem), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


@LOSSES
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_is_that_of_liger_kernel(ours: str, alpha: float, temperature: float) -> None:
    """Its forward KL (beta 0) lacks the T^2, which its weight makes up for."""
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * temperature**2,
        beta=0.0,
        temperature=temperature,
        compiled=False,
        chunk_size=8,
    )
    assert_same(
        lambda problem: our_loss(ours, problem, alpha, temperature),
        lambda problem: liger(*problem.flat()),
        make_problem(),
    )


@LOSSES
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_is_that_of_trl_with_a_cross_entropy(ours: str, alpha: float, temperature: float) -> None:
    """TRL has the KL term alone, without T^2; torch's cross-entropy supplies the other."""
    jsd = peer("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss

    def theirs(problem: Problem) -> Tensor:
        student, teacher = problem.logits()
        kl: Tensor = jsd(student, teacher, labels=problem.labels, beta=0.0, temperature=temperature)
        cross_entropy = F.cross_entropy(student.flatten(0, 1), problem.labels.flatten(), ignore_index=IGNORE_INDEX)
        return alpha * temperature**2 * kl + (1 - alpha) * cross_entropy

    assert_same(lambda problem: our_loss(ours, problem, alpha, temperature), theirs, make_problem())


@LOSSES
def test_without_any_label_all_give_zero(ours: str) -> None:
    problem = make_problem(masked=BATCH * LENGTH)
    jsd = peer("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    assert_same(
        lambda problem: our_loss(ours, problem, 1.0, 1.0),
        lambda problem: jsd(*problem.logits(), labels=problem.labels, beta=0.0),
        problem,
    )


# --- the trainers ------------------------------------------------------------------------------------------------


def make_model(hidden_size: int, seed: int) -> StudentModel:
    """Return a model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = ModelConfig(hidden_size, 2, 4, 2, 2 * hidden_size, VOCAB, LENGTH, 10000.0)
    model = StudentModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def make_batches(count: int) -> list[Batch]:
    """Return batches of whose targets some are ignored, the last of each row among them."""
    torch.manual_seed(5)
    batches = []
    for _ in range(count):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1))
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape) < 0.2] = IGNORE_INDEX
        labels[:, -1] = IGNORE_INDEX
        batches.append({"input_ids": tokens[:, :-1], "labels": labels, "block_id": torch.arange(BATCH)})
    return batches


def train_with_trl(student: StudentModel, teacher: StudentModel, batches: list[Batch], rate: float) -> list[float]:
    gkd = importlib.import_module("gkd")
    theirs = [gkd.to_batch(batch["input_ids"], batch["labels"]) for batch in batches]
    trainer = gkd.make_gkd_trainer(make_llama(student), make_llama(teacher), theirs, rate, Path("trl"), use_cpu=True)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train_with_kd(student: StudentModel, teacher: StudentModel, batches: list[Batch], rate: float) -> list[float]:
    config = TrainingConfig(
        learning_rate=rate, weight_decay=0.0, warmup_steps=0, num_epochs=1, log_interval=1, alpha=1.0, temperature=1.0
    )
    trainer = DistillationTrainer(student, teacher, batches, None, config, "cpu")
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    return [float(loss) for loss in trainer.train()["train_loss"] if loss is not None]


def test_the_trainer_takes_the_steps_of_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    peer("trl.experimental.gkd")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    batches, rate = make_batches(12), 1e-2
    theirs = train_with_trl(make_model(16, seed=0), make_model(24, seed=1), batches, rate)
    ours = train_with_kd(make_model(16, seed=0), make_model(24, seed=1), batches, rate)
    assert len(ours) == len(theirs) == len(batches)
    assert ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
