"""Which weights decay, which optimizer a name gives, and the learning rate of every step."""

import copy
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from kd.config import ModelConfig
from kd.model import StudentModel
from kd.optim import configure_optimizer, create_optimizer, create_schedule, get_parameter_groups
from tests.commands import environment

CONFIG = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=32, max_seq_len=8
)


def grouped_ids(groups: list[dict[str, Any]]) -> list[int]:
    """Return the identities of all grouped parameters."""
    return [id(parameter) for group in groups for parameter in group["params"]]


def learning_rates(warmup_steps: int, total_steps: int, num_steps: int) -> list[float]:
    """Return the learning rate that each optimizer step takes, at a peak of 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule("cosine", optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = StudentModel(CONFIG)
    grouped = grouped_ids(get_parameter_groups(model, weight_decay=0.1))
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "embedding": nn.Embedding(5, 3)})
    decayed = {
        id(parameter): group["weight_decay"]
        for group in get_parameter_groups(model, weight_decay=0.1)
        for parameter in group["params"]
    }
    expected = {"linear.weight": 0.1, "linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "embedding.weight": 0.1}
    assert {name: decayed[id(parameter)] for name, parameter in model.named_parameters()} == expected


def test_frozen_parameters_are_left_out() -> None:
    model = StudentModel(CONFIG)
    model.layers.requires_grad_(False)
    grouped = grouped_ids(get_parameter_groups(model, weight_decay=0.1))
    assert set(grouped) == {id(model.embedding.weight), id(model.norm.weight)}


def test_model_without_vectors_gives_one_group() -> None:
    assert len(get_parameter_groups(nn.Linear(3, 4, bias=False), weight_decay=0.1)) == 1


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD")])
def test_optimizer_equals_the_plain_one_of_torch(name: str, kind: str) -> None:
    extra: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    torch.manual_seed(0)
    start, inputs = torch.randn(4, 3), torch.randn(5, 10, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        create_optimizer(name, [ours], lr=0.05, weight_decay=0.1),
        vars(torch.optim)[kind]([theirs], lr=0.05, weight_decay=0.1, foreach=False, **extra),
    )
    for x in inputs:
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (x @ weight).tanh().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, start)


def test_no_optimizer_waits_for_the_compiler() -> None:
    program = (
        "import sys, torch\nfrom kd.optim import OPTIMIZERS, create_optimizer\n"
        "for name in OPTIMIZERS:\n"
        "    weight = torch.nn.Parameter(torch.ones(2))\n"
        "    optimizer = create_optimizer(name, [weight], lr=0.1)\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n    optimizer.zero_grad()\n    optimizer.load_state_dict(optimizer.state_dict())\n"
        "    assert weight.requires_grad and weight.is_leaf and weight.grad is None\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer=lion.*adamw, adam, sgd"):
        create_optimizer("lion", [nn.Parameter(torch.zeros(1))], lr=0.1)


def test_configured_optimizer_keeps_each_groups_decay() -> None:
    optimizer = configure_optimizer(StudentModel(CONFIG), lr=0.5, weight_decay=0.2)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_optimizer_continues_from_its_state() -> None:
    def train(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 4), 0.1 * step)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    straight, resumed = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = configure_optimizer(straight, lr=0.1)
    train(straight, optimizer, range(3))
    resumed.load_state_dict(straight.state_dict())
    restored = configure_optimizer(resumed, lr=0.9)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it takes the tensors themselves
    train(straight, optimizer, range(3, 6))
    train(resumed, restored, range(3, 6))
    assert torch.equal(straight.weight, resumed.weight)


def test_schedule_warms_up_then_follows_a_cosine() -> None:
    rates = learning_rates(warmup_steps=4, total_steps=12, num_steps=15)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:12] == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(8)])
    assert rates[12:] == [0.0, 0.0, 0.0]


def test_schedule_without_warm_up_starts_at_the_peak() -> None:
    rates = learning_rates(warmup_steps=0, total_steps=10, num_steps=10)
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0)
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(10, 4), (4, 4)])
def test_warm_up_as_long_as_the_run(warmup_steps: int, total_steps: int) -> None:
    rates = learning_rates(warmup_steps, total_steps, num_steps=total_steps)
    assert rates == pytest.approx([2 * (step + 1) / warmup_steps for step in range(total_steps)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_schedules_after_the_warm_up_are_those_of_transformers(name: str, warmup_steps: int) -> None:
    """Theirs starts at a rate of 0, which moves nothing; so their step s + 1 of the warm-up is ours s."""
    total, decay = 20, 5

    def rates(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LambdaLR]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make(optimizer)
        found = []
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    decay_steps = decay if name == "wsd" else None
    ours = rates(lambda optimizer: create_schedule(name, optimizer, warmup_steps, total, decay_steps))
    theirs = rates(lambda optimizer: _transformers_schedule(name, optimizer, warmup_steps, total, decay))
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    assert ours[:warmup_steps] == pytest.approx([*theirs[1:warmup_steps], 2.0][:warmup_steps])


def _transformers_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total: int, decay: int
) -> torch.optim.lr_scheduler.LambdaLR:
    if name == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup_steps)
    if name == "wsd":
        return get_wsd_schedule(
            optimizer, warmup_steps, decay, num_stable_steps=total - warmup_steps - decay, decay_type="linear"
        )
    get = get_linear_schedule_with_warmup if name == "linear" else get_cosine_schedule_with_warmup
    return get(optimizer, warmup_steps, total)


def test_wsd_decays_over_a_tenth_of_the_run_unless_told() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = create_schedule("wsd", optimizer, 0, 40).lr_lambdas[0]
    assert [factor(step) for step in (0, 36, 37, 38, 39, 40)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_an_unknown_schedule_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="schedule=step is unknown: use one of cosine, linear, constant, wsd"):
        create_schedule("step", optimizer, 0, 10)


def test_schedule_state_is_plain_data() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule("cosine", optimizer, 2, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    assert state["lr_lambdas"] == [None]
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    resumed = create_schedule("cosine", other, 2, 10)
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns when a schedule steps before its optimizer
        for one in (schedule, resumed):
            one.step()
    assert resumed.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(-1, 10), (0, 0)])
def test_impossible_schedule_is_refused(warmup_steps: int, total_steps: int) -> None:
    with pytest.raises(ValueError, match=f"warmup_steps={warmup_steps}, total_steps={total_steps}"):
        learning_rates(warmup_steps, total_steps, num_steps=0)
