"""TrainerFromScratch against the same loop made of torch's parts, and against itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from kd.tutorial import AdamWFromScratch, LossScaler, SGDFromScratch, TrainerFromScratch, TrainerSettings
from kd.tutorial.character_model import NextCharacter, character_batches
from kd.tutorial.parts_from_scratch import warmup_cosine
from kd.tutorial.trainer_from_scratch import PRECISIONS, StepReport

from .networks import VOCAB, Batch, cut, furthest, make_batch, make_model

STEPS = 100
PEAK = 5e-3
PAIRS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "AdamW": (
        lambda params: AdamWFromScratch(params, lr=PEAK, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=PEAK, weight_decay=0.1),
    ),
    "SGD": (
        lambda params: SGDFromScratch(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ),
}
Rows = list[dict[str, float]]


def torchs_loop(
    model: nn.Module, optimizer: Optimizer, windows: Sequence[Batch], settings: TrainerSettings, scale: float = 1.0
) -> Rows:
    """Train on each batch as one step with nothing but torch's parts; return loss, norm and rate of each step."""
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, len(windows)))
    dtype = PRECISIONS[settings.precision]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=settings.precision == "float16")
    rows = []
    for batch in windows:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(batch["input_ids"])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        rows.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": float(schedule.get_last_lr()[0])})
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return rows


def records(reports: list[StepReport]) -> Rows:
    return [{"loss": r.loss, "grad_norm": r.grad_norm, "learning_rate": r.learning_rate} for r in reports]


def windows_of(epochs: int = 10) -> list[Batch]:
    return [make_batch(seed) for _ in range(epochs) for seed in range(STEPS // epochs)]


@pytest.mark.parametrize("rows", [8, 4, 2, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_100_steps_are_torchs_however_a_step_is_cut(name: str, rows: int) -> None:
    """The masks are ragged: the mean of the micro-batches' means would be another run."""
    ours, theirs = PAIRS[name]
    first, second, start = (make_model() for _ in range(3))
    settings = TrainerSettings(num_epochs=10, accumulation_steps=8 // rows, warmup_steps=20, max_grad_norm=0.3)
    micro_batches = [part for batch in windows_of()[:10] for part in cut(batch, rows)]
    found = records(TrainerFromScratch(first, ours(first.parameters()), micro_batches, settings=settings).train())
    expected = torchs_loop(second, theirs(second.parameters()), windows_of(), settings)
    assert furthest(first, second) < 1e-6
    assert furthest(first, start) > 0.1
    assert len(found) == STEPS
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    norms = [row["grad_norm"] for row in expected]
    assert min(norms) < 0.3 < max(norms)  # some steps are clipped, some are not


def test_the_mean_of_means_is_another_run() -> None:
    """Else the test above could not tell the two apart."""
    first, second = make_model(), make_model()
    parts = cut(make_batch(0), 1)
    report = TrainerFromScratch(first, torch.optim.SGD(first.parameters(), lr=0.1), parts).train_step(parts)
    means = [F.cross_entropy(second(p["input_ids"]).flatten(0, 1), p["labels"].flatten()) for p in parts]
    torch.stack(means).mean().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(second.parameters(), lr=0.1).step()
    assert report.loss != pytest.approx(torch.stack(means).mean().item(), abs=1e-3)
    assert furthest(first, second) > 1e-4


def test_an_epochs_last_step_may_have_fewer_micro_batches() -> None:
    model, twin = make_model(), make_model()
    batches = [make_batch(seed) for seed in range(5)]
    settings = TrainerSettings(accumulation_steps=2)
    trainer = TrainerFromScratch(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, settings=settings)
    reports = trainer.train()
    targets = int((batches[4]["labels"] != -100).sum())
    assert [report.num_targets for report in reports] == [2 * targets, 2 * targets, targets]
    whole = [{k: torch.cat([b[k] for b in batches[i : i + 2]]) for k in batches[0]} for i in (0, 2, 4)]
    torchs_loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1), whole, settings)
    assert furthest(model, twin) < 1e-6


def test_a_step_without_targets_has_no_gradient() -> None:
    model, start = make_model(), make_model()
    batch = make_batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    trainer = TrainerFromScratch(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch])
    report = trainer.train()[0]
    assert (report.loss, report.num_targets, report.grad_norm) == (0, 0, 0)
    assert furthest(model, start) == 0


# --- mixed precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_torchs(precision: str) -> None:
    first, second, full = (make_model() for _ in range(3))
    settings = TrainerSettings(num_epochs=2, warmup_steps=3, precision=precision)
    batches = [make_batch(seed) for seed in range(10)]
    ours, theirs = PAIRS["SGD"]
    reports = TrainerFromScratch(first, ours(first.parameters()), batches, settings=settings).train()
    expected = torchs_loop(second, theirs(second.parameters()), [*batches, *batches], settings, scale=65536.0)
    torchs_loop(full, theirs(full.parameters()), [*batches, *batches], replace(settings, precision="float32"))
    assert all(report.is_taken for report in reports)
    assert furthest(first, second) < 1e-5 < furthest(first, full)  # the products are in half precision
    assert [report.loss for report in reports] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in first.parameters())


def test_an_overflow_leaves_the_weights_alone_and_halves_the_scale() -> None:
    model, start = make_model(), make_model()
    settings = TrainerSettings(precision="float16")
    batches = [make_batch(seed) for seed in range(30)]
    optimizer = AdamWFromScratch(model.parameters(), lr=PEAK)
    trainer = TrainerFromScratch(model, optimizer, batches, settings=settings, scaler=LossScaler(2.0**30))
    report = trainer.train(until_step=1)[0]
    assert not report.is_taken
    assert (report.loss_scale, trainer.scaler.scale) == (2.0**30, 2.0**29)
    assert furthest(model, start) == 0
    assert not optimizer.state  # not a step with a zero gradient either, which would be one of the moments
    rest = trainer.train()
    assert rest[-1].is_taken
    assert rest[-1].loss_scale < 2.0**29
    assert rest[-1].learning_rate < report.learning_rate  # a step that was left out counts for the schedule


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_that_no_scale_explains_end_the_run(precision: str) -> None:
    model, start = make_model(), make_model()
    handle = model.head.register_forward_hook(lambda *call: call[-1] * float("nan"))
    settings = TrainerSettings(precision=precision)
    trainer = TrainerFromScratch(model, torch.optim.SGD(model.parameters(), lr=1.0), [make_batch(0)], settings=settings)
    with pytest.raises(FloatingPointError, match=r"step 1: .*nan"):
        trainer.train()
    handle.remove()
    assert furthest(model, start) == 0


# --- validation ---------------------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_targets_without_dropout_after_each_epoch() -> None:
    model = make_model(dropout=0.5)
    val = [make_batch(50), make_batch(51, rows=2)]
    settings = TrainerSettings(num_epochs=3, accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = TrainerFromScratch(model, optimizer, [make_batch(seed) for seed in range(4)], val, settings)
    before = trainer.evaluate()
    trainer.train()
    assert [validation.step for validation in trainer.validations] == [2, 4, 6]
    assert model.training
    model.eval()
    nll = [F.cross_entropy(model(b["input_ids"]).flatten(0, 1), b["labels"].flatten(), reduction="sum") for b in val]
    expected = torch.stack(nll).sum() / sum(int((batch["labels"] != -100).sum()) for batch in val)
    after = trainer.validations[-1]
    assert after.loss == pytest.approx(expected.item())
    assert after.perplexity == pytest.approx(expected.exp().item())
    assert after.loss < before.loss


@pytest.mark.parametrize("val_loader", [None, [], [{**make_batch(0), "labels": torch.full((8, 6), -100)}]])
def test_nothing_to_validate_on_is_said(val_loader: Any) -> None:
    model = make_model()
    trainer = TrainerFromScratch(model, torch.optim.SGD(model.parameters()), [make_batch(0)], val_loader)
    with pytest.raises(ValueError, match="no valid target"):
        trainer.evaluate()


# --- checkpoints --------------------------------------------------------------------------------------------------


def shuffled(dropout: float = 0.3, precision: str = "float32") -> TrainerFromScratch:
    """Return a trainer whose every step depends on random numbers: shuffling and dropout."""
    torch.manual_seed(3)
    model = make_model(dropout=dropout)
    batch = make_batch(0, rows=30)
    rows: Any = [{name: x[i] for name, x in batch.items()} for i in range(30)]
    loader: DataLoader[Batch] = DataLoader(rows, batch_size=4, shuffle=True)
    settings = TrainerSettings(num_epochs=3, accumulation_steps=2, warmup_steps=3, precision=precision)
    optimizer = AdamWFromScratch(model.parameters(), lr=PEAK)
    scaler = LossScaler(2.0**24, growth_interval=3) if precision == "float16" else None
    return TrainerFromScratch(model, optimizer, loader, [make_batch(9)], settings, scaler)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (2, 4, 7, 11), (12,)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(
    stops: tuple[int, ...], precision: str, tmp_path: Path
) -> None:
    whole = shuffled(precision=precision)
    expected = whole.train()
    assert len(expected) == 12
    trainer, reports = shuffled(precision=precision), []
    for stop in stops:
        reports += trainer.train(until_step=stop)
        trainer.save_checkpoint(tmp_path / "last.pt")
        torch.rand(stop)  # whatever happened between
        trainer = shuffled(precision=precision)
        trainer.load_checkpoint(tmp_path / "last.pt")
    reports += trainer.train()
    assert furthest(trainer.model, whole.model) == 0
    assert reports == expected or precision == "float16"  # an overflow's norm may be NaN, which equals nothing
    assert [report.loss for report in reports] == [report.loss for report in expected]
    assert trainer.validations == whole.validations
    assert trainer.scaler.scale == whole.scaler.scale
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_the_resumed_run_depends_on_random_numbers() -> None:
    """Else the test above would not see one that is not restored."""
    whole, other = shuffled(), shuffled()
    whole.train()
    torch.rand(1)
    other.train()
    assert furthest(whole.model, other.model) > 1e-4


def test_stopping_without_leaving_the_process_changes_nothing() -> None:
    whole, stopped = shuffled(), shuffled()
    torch.manual_seed(5)
    whole.train()
    torch.manual_seed(5)
    for step in (3, 4, 9):
        stopped.train(until_step=step)
    stopped.train()
    assert furthest(whole.model, stopped.model) == 0


def test_the_checkpoints_learning_rate_holds(tmp_path: Path) -> None:
    whole, stopped, other = shuffled(), shuffled(), shuffled()
    expected = whole.train()[-1].learning_rate
    stopped.train(until_step=5)
    stopped.save_checkpoint(tmp_path / "last.pt")
    other.peak_rates = [1.0]  # as if made with another optimizer
    other.load_checkpoint(tmp_path / "last.pt")
    assert other.train()[-1].learning_rate == expected


def test_a_checkpoint_that_is_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        shuffled().load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"num_epochs": 0}, {"accumulation_steps": 0}, {"max_grad_norm": 0.0}, {"warmup_steps": -1}, {"precision": "int8"}],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}={changes[name]}"):
        TrainerSettings(**changes)


def test_an_empty_loader_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="train_loader is empty"):
        TrainerFromScratch(model, torch.optim.SGD(model.parameters()), [])


def test_lines_are_printed_at_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    settings = TrainerSettings(log_interval=2)
    TrainerFromScratch(
        model, torch.optim.SGD(model.parameters()), [make_batch(i) for i in range(5)], settings=settings
    ).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5"]


def test_the_character_model_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = NextCharacter(VOCAB, context=3).eval()
    ids = make_batch(0)["input_ids"]
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    same = torch.isclose(model(ids), model(changed)).all(dim=-1).all(dim=0)
    assert same.tolist() == [True] * 4 + [False] * 2


def test_character_batches_hold_the_text_and_what_follows() -> None:
    batches, vocab_size = character_batches("abcabcabcabc", length=3, rows=2)
    assert vocab_size == 3
    inputs, labels = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels"))
    assert inputs.tolist() == [[0, 1, 2]] * 3
    assert labels.tolist() == [[1, 2, 0]] * 3
