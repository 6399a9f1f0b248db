"""GRPO: the loss of rollouts by hand, the reference, and windows of several steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.config import GRPOConfig
from kd.errors import Interrupted
from kd.losses import IGNORE_INDEX
from kd.model import StudentModel
from kd.trainers.state import Batch

from .examples import PROMPTS, draw, grpo, make_prompts, make_rollouts, online, share_of_a
from .helpers import checkpoints_in, history_of, make_student, same_tensors, stop_in, weights

NO_PENALTY = {"kl_coef": 0.0}


# --- rollouts that are supplied ---------------------------------------------------------------------------------


def response_logprobs(model: StudentModel, rollouts: Batch) -> list[Tensor]:
    """Return, for each response, the log-probabilities of the vocabulary at each of its tokens, (R, V)."""
    found = []
    for row in range(len(rollouts["responses"])):
        prompt = rollouts["prompts"][row][rollouts["prompt_attention_mask"][row] > 0].tolist()
        response = rollouts["responses"][row][rollouts["response_attention_mask"][row] > 0].tolist()
        log_p = model(torch.tensor([prompt + response]))[0].double().log_softmax(-1)
        found.append(log_p[len(prompt) - 1 : -1])
    return found


def by_hand(rollouts: Batch, *, kl_coef: float, entropy_coef: float, clip: float) -> tuple[dict[str, float], Any]:
    """Return the loss with its parts, token by token, and the gradient of the embedding."""
    model, reference = make_student(), make_student(seed=3)
    rewards = rollouts["rewards"].double().view(-1, 2)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1)
    policy, kl, entropy, clipped = [], [], [], []
    theirs = response_logprobs(reference, rollouts)
    for row, log_p in enumerate(response_logprobs(model, rollouts)):
        is_real = rollouts["response_attention_mask"][row] > 0
        tokens, old = rollouts["responses"][row][is_real], rollouts["old_logprobs"][row][is_real]
        for i, token in enumerate(tokens):
            ratio = (log_p[i, token] - float(old[i])).exp()
            bounded = ratio.clamp(1 - clip, 1 + clip)
            policy.append(-torch.minimum(ratio * advantages[row], bounded * advantages[row]))
            clipped.append(float(bool(bounded * advantages[row] < ratio * advantages[row])))
            log_q = theirs[row][i, token].detach() - log_p[i, token]
            kl.append(log_q.exp() - log_q - 1)
            entropy.append(-(log_p[i].exp() * log_p[i]).sum())
    parts = {name: torch.stack(x).mean() for name, x in (("policy_loss", policy), ("kl", kl), ("entropy", entropy))}
    loss = parts["policy_loss"] + kl_coef * parts["kl"] - entropy_coef * parts["entropy"]
    loss.backward()  # type: ignore[no-untyped-call]
    constant = float((rewards[:, 0] == rewards[:, 1]).double().mean())
    values = {name: float(part.detach()) for name, part in {"loss": loss, **parts}.items()}
    values |= {"reward": float(rewards.mean()), "constant_groups": constant}
    return {**values, "clip_fraction": sum(clipped) / len(clipped)}, model.embedding.weight.grad


@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_the_loss_of_rollouts_is_that_of_a_loop_over_tokens(kl_coef: float, entropy_coef: float) -> None:
    rollouts = make_rollouts(5, seed=2)
    settings = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "clip_range": 0.4}
    trainer = grpo(make_student(), ref_model=make_student(seed=3), **settings)
    found = trainer.training_step(rollouts)
    expected, gradient = by_hand(rollouts, kl_coef=kl_coef, entropy_coef=entropy_coef, clip=0.4)
    assert 0 < expected["clip_fraction"] < 1
    assert 0 < expected["constant_groups"] < 1
    assert found.keys() == {"loss", *trainer.loss_terms}
    assert found.keys() >= {"loss", "reward", "policy_loss", "clip_fraction", "constant_groups"}
    assert ("kl" in found, "entropy" in found) == (kl_coef > 0, entropy_coef > 0)
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
    torch.testing.assert_close(trainer.model.get_parameter("embedding.weight").grad, gradient, rtol=1e-4, atol=1e-5)


def test_supplied_log_probabilities_stand_at_their_tokens() -> None:
    rollouts = make_rollouts(4, seed=1)
    prepared = grpo(make_student())._prepare_batch(rollouts)
    real = rollouts["response_attention_mask"] > 0
    for row in range(8):
        is_target = prepared["labels"][row] != IGNORE_INDEX
        assert prepared["labels"][row][is_target].tolist() == rollouts["responses"][row][real[row]].tolist()
        assert torch.equal(prepared["old_logprobs"][row][is_target], rollouts["old_logprobs"][row][real[row]])
        assert not prepared["old_logprobs"][row][~is_target].any()


def test_without_old_log_probabilities_the_ratio_is_one() -> None:
    rollouts = make_rollouts(4, seed=1)
    del rollouts["old_logprobs"]
    for epochs in (1, 2):
        terms = grpo(make_student(), optimization_epochs=epochs, **NO_PENALTY).training_step(rollouts)
        advantages = grpo(make_student())._prepare_batch(rollouts)["advantages"]
        lengths = rollouts["response_attention_mask"].sum(dim=1)
        assert terms["policy_loss"] == pytest.approx(float(-(advantages * lengths).sum() / lengths.sum()), abs=1e-6)
        assert terms["clip_fraction"] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_rewards_may_be_numbers_of_any_type(dtype: torch.dtype) -> None:
    rollouts = make_rollouts(3)
    rollouts["rewards"] = torch.tensor([0, 1, 1, 1, 1, 0])
    expected = grpo(make_student()).training_step(rollouts)
    assert grpo(make_student()).training_step({**rollouts, "rewards": rollouts["rewards"].to(dtype)}) == expected


def test_masks_may_be_left_out_where_nothing_is_padded() -> None:
    generator = torch.Generator().manual_seed(0)
    rollouts = {
        "prompts": torch.randint(13, (4, 3), generator=generator),
        "responses": torch.randint(13, (4, 4), generator=generator),
    }
    masks = {"prompt_attention_mask": torch.ones(4, 3).long(), "response_attention_mask": torch.ones(4, 4).long()}
    rewards = {"rewards": (rollouts["responses"] == 0).float().mean(dim=1)}
    expected = grpo(make_student()).training_step({**rollouts, **masks, **rewards})
    assert grpo(make_student()).training_step({**rollouts, **rewards}) == expected
    assert grpo(make_student(), reward_fn=share_of_a).training_step(rollouts) == expected


def test_the_reward_function_reads_no_padding() -> None:
    rollouts = make_rollouts(3)
    del rollouts["rewards"]
    seen: list[str] = []

    def keep(responses: list[str], _batch: Batch) -> list[float]:
        seen.extend(responses)
        return share_of_a(responses, _batch)

    grpo(make_student(), reward_fn=keep).training_step(rollouts)
    real = rollouts["response_attention_mask"] > 0
    rows = [row[mask].tolist() for row, mask in zip(rollouts["responses"], real, strict=True)]
    assert seen == ["".join(chr(97 + token) for token in row) for row in rows]
    assert len({len(row) for row in rows}) > 1


def test_groups_of_equal_rewards_give_no_gradient() -> None:
    rollouts = make_rollouts(4)
    rollouts["rewards"] = torch.tensor([0.1, 0.1, 0.7, 0.7, 0.0, 0.0, -3.3, -3.3])
    trainer = grpo(make_student(), [rollouts], num_epochs=3, weight_decay=0.0, **NO_PENALTY)
    before = weights(trainer.model)
    terms = trainer.training_step(rollouts)
    assert (terms["loss"], terms["constant_groups"]) == (0.0, 1.0)
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())
    trainer.train()
    assert same_tensors(before, weights(trainer.model))


def test_responses_without_tokens_give_zero() -> None:
    rollouts = make_rollouts(2)
    rollouts["response_attention_mask"] = torch.zeros_like(rollouts["response_attention_mask"])
    terms = grpo(make_student(), entropy_coef=0.1).training_step(rollouts)
    assert all(math.isfinite(value) for value in terms.values())
    assert terms["loss"] == 0


def test_groups_of_equal_rewards_spoil_no_others_of_their_step() -> None:
    constant, telling = make_rollouts(2, seed=1), make_rollouts(3)
    constant["rewards"] = torch.full_like(constant["rewards"], 0.3)
    settings: dict[str, Any] = {"num_epochs": 2, "gradient_accumulation_steps": 2, "log_interval": 1, **NO_PENALTY}
    trainer = grpo(make_student(), [constant, telling], **settings)
    history: Any = trainer.train()
    assert all(norm > 0 for norm in history["grad_norm"])
    assert all(math.isfinite(loss) and loss != 0 for loss in history["train_loss"])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


# --- the reference ----------------------------------------------------------------------------------------------


def test_without_a_penalty_there_is_no_reference() -> None:
    assert grpo(make_student(), **NO_PENALTY)._reference is None


def test_the_reference_is_the_model_before_training_and_stays_so() -> None:
    trainer = grpo(make_student(), [make_rollouts(4)], num_epochs=4, log_interval=1, kl_coef=0.1)
    history: Any = trainer.train()
    assert trainer._reference is not None
    assert same_tensors(weights(trainer._reference.model), weights(make_student()))
    assert history["kl"][0] == 0
    assert history["kl"][-1] > 0


def test_the_model_cannot_be_its_own_reference() -> None:
    model = make_student()
    with pytest.raises(ValueError, match="ref_model is the trained model itself"):
        grpo(model, ref_model=model)


# --- several steps on a window ----------------------------------------------------------------------------------

# 5 batches give 3 windows an epoch, the last of one batch; 12 steps in all.
WINDOWS: dict[str, Any] = {
    "optimization_epochs": 2,
    "num_epochs": 2,
    "gradient_accumulation_steps": 2,
    "log_interval": 1,
    "eval_interval": 4,
    "learning_rate": 0.02,
}


def windowed(run_dir: Path, seed: int = 0, **settings: Any) -> Any:
    batches = [make_prompts(draw([1, 1 + number % 3], number)) for number in range(5)]
    model = make_student(seed, dropout=settings.pop("dropout", 0.0))
    settings = {"ref_model": make_student(seed=3), **WINDOWS, **settings}
    return online(model, batches, [PROMPTS], run_dir=run_dir, **settings)


def test_each_window_of_rollouts_takes_two_steps(tmp_path: Path) -> None:
    trainer = windowed(tmp_path, clip_range=1e-3, warmup_steps=3)
    samples: list[int] = []
    draw_responses = trainer.rollouts.draw

    def counting(batch: Batch, config: GRPOConfig) -> Batch:
        samples.append(trainer.step)
        return draw_responses(batch, config)  # type: ignore[no-any-return]

    trainer.rollouts.draw = counting
    history = trainer.train()
    assert trainer.total_steps == trainer.step == 12
    assert samples == [0, 0, 2, 2, 4, 6, 6, 8, 8, 10]
    assert history["train_step"] == list(range(1, 13))
    first, second = history["clip_fraction"][0::2], history["clip_fraction"][1::2]
    assert max(first) == 0
    assert min(second) > 0.05
    assert history["val_step"] == [4, 8, 12]
    assert history["learning_rate"][:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])


def test_the_second_step_counts_the_ratio_to_the_policy_of_the_first() -> None:
    rollouts = make_rollouts(4)
    del rollouts["old_logprobs"]
    settings = {"num_epochs": 1, "gradient_clip": 1e9, **NO_PENALTY}
    trainer = grpo(make_student(), [rollouts], optimization_epochs=2, **settings)
    steps: list[tuple[dict[str, Tensor], Tensor]] = []

    def keep(*_: Any) -> None:
        gradient = trainer.model.get_parameter("norm.weight").grad
        assert gradient is not None
        steps.append((weights(trainer.model), gradient.clone()))

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    assert len(steps) == 2
    old = torch.zeros(rollouts["responses"].shape)
    for row, log_p in enumerate(response_logprobs(make_student(), rollouts)):
        tokens = rollouts["responses"][row, : len(log_p)]
        old[row, : len(log_p)] = log_p.detach().float().gather(1, tokens.unsqueeze(1)).squeeze(1)
    for before, gradient in steps:
        other = grpo(make_student(), **settings)
        other.model.load_state_dict(before)
        other.training_step({**rollouts, "old_logprobs": old})
        torch.testing.assert_close(other.model.get_parameter("norm.weight").grad, gradient, rtol=1e-4, atol=1e-6)


def without_old_logprobs(seed: int = 0) -> Batch:
    return {name: value for name, value in make_rollouts(4, seed).items() if name != "old_logprobs"}


def test_the_ratio_of_the_first_epoch_is_exactly_one() -> None:
    trainer = grpo(make_student(), optimization_epochs=2)
    prepared = trainer._prepare_batch(without_old_logprobs())
    assert torch.equal(prepared["old_logprobs"], trainer._forward(prepared).policy.logprobs.detach())
    assert not prepared["old_logprobs"].requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_old_log_probabilities_know_no_dropout(training: bool) -> None:
    trainer = grpo(make_student(dropout=0.5), optimization_epochs=2)
    trainer.model.train(training)
    prepared = trainer._prepare_batch(without_old_logprobs())
    assert all(module.training == training for module in trainer.model.modules())
    expected = grpo(make_student(), optimization_epochs=2)._prepare_batch(without_old_logprobs())
    assert torch.equal(prepared["old_logprobs"], expected["old_logprobs"])


def test_with_dropout_the_ratio_is_one_in_a_single_epoch_alone() -> None:
    fractions = []
    for epochs in (1, 2):
        trainer = grpo(make_student(dropout=0.5), optimization_epochs=epochs, clip_range=1e-3, **NO_PENALTY)
        fractions.append(trainer.training_step(without_old_logprobs())["clip_fraction"])
    assert fractions[0] == 0
    assert fractions[1] > 0.2


@pytest.mark.parametrize("save_interval", [1, 3, 4])
def test_checkpoints_lie_between_windows(tmp_path: Path, save_interval: int) -> None:
    trainer = windowed(tmp_path, save_interval=save_interval)
    trainer.train()
    expected = {1: [2, 4, 6, 8, 10, 12], 3: [4, 6, 10, 12], 4: [4, 8, 12]}
    assert checkpoints_in(tmp_path) == expected[save_interval]


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    unstopped = windowed(tmp_path / "a", dropout=0.2)
    unstopped.train()
    stopped = windowed(tmp_path / "b", dropout=0.2)
    stop_in(stopped, step)
    with pytest.raises(Interrupted):
        stopped.train()
    between = step + step % 2
    assert checkpoints_in(tmp_path / "b") == [between]
    resumed = windowed(tmp_path / "b", seed=9, dropout=0.2)
    resumed.load_checkpoint(tmp_path / "b" / "checkpoints" / f"checkpoint-{between}")
    resumed.train()
    assert same_tensors(weights(resumed.model), weights(unstopped.model))
    assert history_of(resumed) == history_of(unstopped)


def test_a_stop_where_an_evaluation_is_due_amid_a_window_waits_for_its_end(tmp_path: Path) -> None:
    unstopped = windowed(tmp_path / "a", eval_interval=3)
    unstopped.train()
    stopped = windowed(tmp_path / "b", eval_interval=3)
    stop_in(stopped, 3)
    with pytest.raises(Interrupted):
        stopped.train()
    assert checkpoints_in(tmp_path / "b") == [4]
    resumed = windowed(tmp_path / "b", seed=9, eval_interval=3)
    resumed.load_checkpoint(tmp_path / "b" / "checkpoints" / "checkpoint-4")
    resumed.train()
    assert same_tensors(weights(resumed.model), weights(unstopped.model))
    assert history_of(resumed) == history_of(unstopped)
