"""Our losses and our trainer against independent implementations: Liger-Kernel's loss, TRL's losses and trainers.

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
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from kd.config import DPOConfig, GRPOConfig, ModelConfig, ORPOConfig, TrainingConfig
from kd.linear_distillation import linear_distillation_loss
from kd.losses import IGNORE_INDEX, distillation_loss
from kd.model import StudentModel
from kd.policy_losses import group_advantages, grpo_loss
from kd.preference_losses import dpo_loss, orpo_odds_ratio_loss
from kd.tiles import Tiling
from kd.token_logprobs import TokenLogprobs, linear_token_logprobs
from kd.trainers import BaseTrainer, DistillationTrainer, DPOTrainer, GRPOTrainer, ORPOTrainer
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


# --- preferences and policies: TRL's trainers compute their losses on given batches ----------------------------------

PROMPT_LENGTHS, CHOSEN_LENGTHS, REJECTED_LENGTHS = (3, 1, 5, 2), (4, 6, 1, 5), (2, 3, 6, 9)
BETA = 0.3


@dataclass
class Texts:
    """Prompts with answers, of different lengths; all (B, L)."""

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor

    def targets(self) -> Tensor:
        """Return the answers' tokens where they are the next ones."""
        shifted = self.input_ids.masked_fill(self.answer_mask == 0, IGNORE_INDEX)[:, 1:]
        return F.pad(shifted, (0, 1), value=IGNORE_INDEX)


def make_pairs(prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS) -> Texts:
    """Return the chosen answers behind their prompts, then the rejected ones, padded on the right."""
    torch.manual_seed(9)
    prompts = [torch.randint(1, VOCAB, (length,)) for length in prompt_lengths]
    answers = [torch.randint(1, VOCAB, (length,)) for length in CHOSEN_LENGTHS + REJECTED_LENGTHS]
    rows = [torch.cat((prompt, answer)) for prompt, answer in zip(prompts * 2, answers, strict=True)]
    is_answer = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts * 2, strict=True)]
    masks = (pad_sequence([row > 0 for row in rows], True), pad_sequence(is_answer, True))
    return Texts(pad_sequence(rows, True), masks[0].long(), masks[1].long())


def make_rollouts() -> Texts:
    """Return prompts padded on the left, each with an answer padded on the right."""
    torch.manual_seed(10)
    prompts = torch.randint(1, VOCAB, (4, max(PROMPT_LENGTHS)))
    answers = torch.randint(1, VOCAB, (4, max(CHOSEN_LENGTHS)))
    prompt_mask = (torch.arange(prompts.size(1)) >= prompts.size(1) - torch.tensor(PROMPT_LENGTHS).unsqueeze(1)).long()
    answer_mask = (torch.arange(answers.size(1)) < torch.tensor(CHOSEN_LENGTHS).unsqueeze(1)).long()
    return Texts(
        torch.cat((prompts * prompt_mask, answers * answer_mask), dim=1),
        torch.cat((prompt_mask, answer_mask), dim=1),
        torch.cat((torch.zeros_like(prompt_mask), answer_mask), dim=1),
    )


def policy() -> LlamaForCausalLM:
    return make_llama(make_model(16, seed=0))


def reference() -> LlamaForCausalLM:
    return make_llama(make_model(16, seed=1))


def scores(llama: LlamaForCausalLM, texts: Texts, labels: Tensor, with_entropy: bool = False) -> TokenLogprobs:
    hidden = llama.model(input_ids=texts.input_ids, attention_mask=texts.attention_mask).last_hidden_state
    return linear_token_logprobs(hidden, llama.lm_head.weight, labels, with_entropy=with_entropy, chunk_tokens=7)


def make_trl(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, *models: LlamaForCausalLM, options: dict[str, Any]
) -> Any:
    """Return a trainer of TRL's; the data that it wants are never read."""
    trl = peer(module)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arguments = {"output_dir": "trl", "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    texts = Dataset.from_dict({name: ["<eos>"] for name in ("prompt", "chosen", "rejected")})
    rewards = {"reward_funcs": _no_reward} if name == "GRPO" else {}
    return getattr(trl, f"{name}Trainer")(
        *models,
        args=getattr(trl, f"{name}Config")(**arguments, gradient_checkpointing=False, **options),
        train_dataset=texts,
        processing_class=importlib.import_module("gkd")._any_tokenizer(),
        **rewards,
    )


def _no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def assert_same_step(ours: LlamaForCausalLM, our_loss: Tensor, theirs: LlamaForCausalLM, their_loss: Tensor) -> None:
    """Compare two losses and their gradients by every weight."""
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    found = torch.autograd.grad(our_loss, list(ours.parameters()))
    wanted = torch.autograd.grad(their_loss, list(theirs.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    assert largest > 1e-3
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * largest)


def our_dpo_loss(llama: LlamaForCausalLM, pairs: Texts, label_smoothing: float) -> Tensor:
    labels = pairs.targets()
    with torch.no_grad():
        held = scores(reference(), pairs, labels).logprobs.sum(dim=1).chunk(2)
    return dpo_loss(*scores(llama, pairs, labels).logprobs.sum(dim=1).chunk(2), *held, BETA, label_smoothing).losses


def their_dpo_loss(trainer: Any, pairs: Texts, rows: Tensor) -> Tensor:
    inputs = {
        "input_ids": pairs.input_ids[rows],
        "attention_mask": pairs.attention_mask[rows],
        "completion_mask": pairs.answer_mask[rows],
    }
    loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


def test_dpo_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, llama = make_pairs(), policy()
    trainer = make_trl(monkeypatch, "trl", "DPO", policy(), reference(), options={"beta": BETA})
    theirs = their_dpo_loss(trainer, pairs, torch.arange(8))
    assert_same_step(llama, our_dpo_loss(llama, pairs, 0.0).mean(), trainer.model, theirs)


def test_dpo_with_label_smoothing_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TRL's losses "aot" has it; that sorts the pairs' margins, which is nothing for a single pair."""
    pairs, llama = make_pairs(), policy()
    options = {"beta": BETA, "label_smoothing": 0.2, "loss_type": ["aot"]}
    trainer = make_trl(monkeypatch, "trl", "DPO", policy(), reference(), options=options)
    theirs = torch.stack([their_dpo_loss(trainer, pairs, torch.tensor([row, row + 4])) for row in range(4)])
    assert_same_step(llama, our_dpo_loss(llama, pairs, 0.2).mean(), trainer.model, theirs.mean())


def their_orpo_loss(trainer: Any, pairs: Texts) -> Tensor:
    answers = pairs.input_ids.masked_fill(pairs.answer_mask == 0, IGNORE_INDEX)
    batch = {}
    for name, rows in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        batch[f"{name}_input_ids"], batch[f"{name}_labels"] = pairs.input_ids[rows], answers[rows]
        batch[f"{name}_attention_mask"] = pairs.attention_mask[rows]
    loss: Tensor = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    return loss


def test_orpo_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cross-entropy is that of the chosen text with its prompt."""
    pairs, llama = make_pairs(), policy()
    trainer = make_trl(monkeypatch, "trl.experimental.orpo", "ORPO", policy(), options={"beta": BETA})
    theirs = their_orpo_loss(trainer, pairs)

    labels = pairs.targets()
    means = scores(llama, pairs, labels).logprobs.sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1)
    everything = Texts(pairs.input_ids[:4], pairs.attention_mask[:4], pairs.attention_mask[:4])
    targets = everything.targets()
    cross_entropy = -scores(llama, everything, targets).logprobs.sum() / (targets != IGNORE_INDEX).sum()
    ours = cross_entropy + BETA * orpo_odds_ratio_loss(*means.chunk(2)).mean()
    assert_same_step(llama, ours, trainer.model, theirs)


def old_and_held(texts: Texts) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the responses: some near the policy's, and the reference's."""
    start, targets = max(PROMPT_LENGTHS), texts.targets()
    with torch.no_grad():
        held, old = (scores(llama, texts, targets).logprobs[:, start - 1 : -1] for llama in (reference(), policy()))
    return old + 0.3 * torch.randn(old.shape) * texts.answer_mask[:, start:], held


def make_trl_grpo(monkeypatch: pytest.MonkeyPatch, loss_type: str, kl_coef: float, entropy_coef: float) -> Any:
    options = {
        "beta": 0.0,  # otherwise a reference is loaded from a path; the loss reads it below
        "use_bias_correction_kl": False,  # its default weighs the paper's KL with the ratio (arXiv:2512.02556)
        "epsilon": 0.2,
        "loss_type": loss_type,
        "entropy_coef": entropy_coef,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
    }
    trainer = make_trl(monkeypatch, "trl", "GRPO", policy(), options=options)
    trainer.beta = kl_coef
    trainer.model.eval()
    return trainer


def their_grpo_loss(trainer: Any, texts: Texts, old: Tensor, held: Tensor, advantages: Tensor) -> Tensor:
    start = max(PROMPT_LENGTHS)
    inputs = {
        "prompt_ids": texts.input_ids[:, :start],
        "prompt_mask": texts.attention_mask[:, :start],
        "completion_ids": texts.input_ids[:, start:],
        "completion_mask": texts.answer_mask[:, start:],
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": held,
        "num_items_in_batch": texts.answer_mask.sum(),
    }
    loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.0, 0.0), (0.04, 0.0), (0.04, 0.1)])
def test_grpo_is_that_of_trl(
    monkeypatch: pytest.MonkeyPatch, loss_type: str, kl_coef: float, entropy_coef: float
) -> None:
    texts, llama = make_rollouts(), policy()
    width, start = max(CHOSEN_LENGTHS), max(PROMPT_LENGTHS)
    mask, labels = texts.answer_mask[:, start:], texts.targets()
    old, held = old_and_held(texts)
    advantages = torch.tensor([1.2, -0.7, -1.1, 0.4])
    trainer = make_trl_grpo(monkeypatch, loss_type, kl_coef, entropy_coef)
    theirs = their_grpo_loss(trainer, texts, old, held, advantages)

    found = scores(llama, texts, labels, with_entropy=True)
    assert found.entropy is not None
    logprobs, entropy = (part[:, start - 1 : start - 1 + width] for part in (found.logprobs, found.entropy))
    terms = grpo_loss(logprobs, old, advantages, mask, 0.2, kl_coef, held, entropy, entropy_coef)
    assert 0 < terms.clip_fraction < 1
    assert_same_step(llama, terms.loss, trainer.model, theirs)
    assert float(terms.clip_fraction) == pytest.approx(trainer._metrics["eval"]["clip_ratio/region_mean"][0])


def test_advantages_use_the_standard_deviation_of_trl() -> None:
    nanstd = peer("trl.trainer.utils").nanstd
    torch.manual_seed(0)
    rewards = torch.rand(12)
    groups = rewards.view(3, 4)
    expected = (groups - groups.mean(dim=1, keepdim=True)) / (nanstd(groups, dim=1).unsqueeze(1) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4), expected.view(-1), rtol=1e-5, atol=1e-6)


# --- whole trainers: a training step on a model of transformers ------------------------------------------------------


def pair_batch(pairs: Texts) -> Batch:
    """Return the pairs as our trainers take them: prompts padded on the left, answers apart from them."""
    is_prompt = (pairs.attention_mask - pairs.answer_mask).bool()
    parts = {
        "prompt": [row[real].flip(0) for row, real in zip(pairs.input_ids[:4], is_prompt[:4], strict=True)],
        "chosen": [row[real > 0] for row, real in zip(pairs.input_ids[:4], pairs.answer_mask[:4], strict=True)],
        "rejected": [row[real > 0] for row, real in zip(pairs.input_ids[4:], pairs.answer_mask[4:], strict=True)],
    }
    batch = {}
    for name, rows in parts.items():
        tokens, mask = pad_sequence(rows, True), pad_sequence([torch.ones_like(row) for row in rows], True)
        flipped = name == "prompt"
        batch[f"{name}_input_ids"] = tokens.flip(1) if flipped else tokens
        batch[f"{name}_attention_mask"] = mask.flip(1) if flipped else mask
    return batch


def assert_step_of(ours: BaseTrainer[Any], batch: Batch, theirs: Any, their_loss: Tensor) -> dict[str, float]:
    """Compare a training step's loss and gradients with those of a trainer of TRL's; return our terms."""
    terms = ours.training_step(batch)
    assert terms["loss"] == pytest.approx(float(their_loss.detach()), rel=1e-5)
    wanted = torch.autograd.grad(their_loss, list(theirs.model.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    assert largest > 1e-3
    for parameter, expected in zip(ours.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6 * largest)
    return terms


def test_the_dpo_trainers_step_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, ours = make_pairs(), DPOTrainer(policy(), ref_model=reference(), config=DPOConfig(beta=BETA))
    trainer = make_trl(monkeypatch, "trl", "DPO", policy(), reference(), options={"beta": BETA})
    theirs = their_dpo_loss(trainer, pairs, torch.arange(8))
    terms = assert_step_of(ours, pair_batch(pairs), trainer, theirs)
    logged = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    assert terms["reward_margin"] == pytest.approx(logged["rewards/margins"], rel=1e-5)
    assert terms["reward_accuracy"] == logged["rewards/accuracies"]


def test_the_orpo_trainers_step_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's cross-entropy counts prompts too, all but their first token: with prompts of one token it is ours."""
    pairs, ours = make_pairs((1, 1, 1, 1)), ORPOTrainer(policy(), config=ORPOConfig(beta=BETA))
    trainer = make_trl(monkeypatch, "trl.experimental.orpo", "ORPO", policy(), options={"beta": BETA})
    assert_step_of(ours, pair_batch(pairs), trainer, their_orpo_loss(trainer, pairs))


def test_the_orpo_trainers_odds_ratio_is_that_of_trl_with_any_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, ours = make_pairs(), ORPOTrainer(policy(), config=ORPOConfig(beta=BETA))
    trainer = make_trl(monkeypatch, "trl.experimental.orpo", "ORPO", policy(), options={"beta": BETA})
    terms = ours.training_step(pair_batch(pairs))
    whole = Texts(pairs.input_ids[:4], pairs.attention_mask[:4], pairs.attention_mask[:4]).targets()
    logits = policy()(pairs.input_ids[:4]).logits
    with_prompts = F.cross_entropy(logits.flatten(0, 1), whole.flatten(), ignore_index=IGNORE_INDEX)
    theirs = their_orpo_loss(trainer, pairs) - with_prompts
    assert BETA * terms["odds_ratio_loss"] == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert terms["ce_loss"] != pytest.approx(float(with_prompts.detach()), rel=1e-2)


@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.0, 0.0), (0.04, 0.0), (0.04, 0.1)])
def test_the_grpo_trainers_step_is_that_of_trl(
    monkeypatch: pytest.MonkeyPatch, kl_coef: float, entropy_coef: float
) -> None:
    texts, start = make_rollouts(), max(PROMPT_LENGTHS)
    rewards, (old, held) = torch.tensor([1.0, 0.2, 0.3, 0.9]), old_and_held(texts)
    config = GRPOConfig(group_size=2, clip_range=0.2, kl_coef=kl_coef, entropy_coef=entropy_coef)
    ours = GRPOTrainer(policy(), ref_model=reference(), config=config)
    trainer = make_trl_grpo(monkeypatch, "bnpo", kl_coef, entropy_coef)
    theirs = their_grpo_loss(trainer, texts, old, held, group_advantages(rewards, 2))
    batch = {
        "prompts": texts.input_ids[:, :start],
        "prompt_attention_mask": texts.attention_mask[:, :start],
        "responses": texts.input_ids[:, start:],
        "response_attention_mask": texts.answer_mask[:, start:],
        "rewards": rewards,
        "old_logprobs": old,
    }
    terms = assert_step_of(ours, batch, trainer, theirs)
    assert 0 < terms["clip_fraction"] < 1
    if kl_coef > 0:
        assert terms["kl"] == pytest.approx(trainer._metrics["eval"]["kl"][0], rel=1e-5)
