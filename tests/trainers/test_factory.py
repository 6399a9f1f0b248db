"""Trainers by name."""

from typing import Any

import pytest
import torch

import kd.trainers
from kd.config import DPOConfig, GRPOConfig, ORPOConfig, PretrainConfig, SFTConfig, TrainerConfig, TrainingConfig
from kd.trainers import (
    BaseTrainer,
    DistillationTrainer,
    DPOTrainer,
    GRPOTrainer,
    ORPOTrainer,
    PretrainTrainer,
    SFTTrainer,
    configure_optimizer,
    create_trainer,
    get_trainer_class,
)
from kd.trainers.state import Batch

from .examples import make_answers, make_pairs, make_rollouts
from .helpers import make_batch, make_student, same_tensors, weights

CLASSES: dict[str, type[BaseTrainer[Any]]] = {
    "pretrain": PretrainTrainer,
    "sft": SFTTrainer,
    "dpo": DPOTrainer,
    "orpo": ORPOTrainer,
    "grpo": GRPOTrainer,
    "distillation": DistillationTrainer,
}
CONFIGS: list[type[TrainerConfig]] = [
    PretrainConfig, SFTConfig, DPOConfig, ORPOConfig, GRPOConfig, TrainingConfig
]  # fmt: skip
ALONE = [name for name in CLASSES if name != "distillation"]


def batch_for(name: str) -> Batch:
    if name in ("dpo", "orpo"):
        return make_pairs(4)
    if name == "grpo":
        return make_rollouts(4, size=8)
    return make_answers(4) if name == "sft" else make_batch(4)


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_has_its_class(name: str) -> None:
    found = get_trainer_class(name)
    assert found is CLASSES[name]
    assert issubclass(found, BaseTrainer)
    assert found.__name__ in kd.trainers.__all__


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_config_names_the_trainer_that_takes_it(config_class: type[TrainerConfig]) -> None:
    assert get_trainer_class(config_class.trainer).config_class is config_class


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("name", ALONE)
def test_a_trainer_by_name_trains(name: str, settings: dict[str, Any]) -> None:
    model = make_student()
    before = weights(model)
    config = get_trainer_class(name).config_class(warmup_steps=0, num_epochs=1, **settings)
    trainer = create_trainer(name, model=model, train_loader=[batch_for(name)], config=config, device="cpu")
    assert type(trainer) is CLASSES[name]
    assert isinstance(trainer, BaseTrainer)
    trainer.train()
    assert not same_tensors(before, weights(model))


@pytest.mark.parametrize("name", ALONE)
def test_without_a_config_it_has_its_own_defaults(name: str) -> None:
    trainer = create_trainer(name, make_student())
    assert trainer.config == CLASSES[name].config_class()


def test_all_arguments_reach_the_trainer(tmp_path: Any) -> None:
    model, config = make_student(), SFTConfig(num_epochs=2)
    optimizer = configure_optimizer(model, "sgd", lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loaders = [make_answers(2)], [make_answers(3)]
    trainer = create_trainer(
        "sft", model, optimizer, *loaders, lr_scheduler=schedule, config=config, device="cpu", run_dir=tmp_path
    )
    assert (trainer.model, trainer.optimizer, trainer.lr_scheduler) == (model, optimizer, schedule)
    assert (trainer.train_loader, trainer.val_loader) == loaders
    assert (trainer.config, trainer.device, trainer.run_dir) == (config, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("make", [get_trainer_class, lambda name: create_trainer(name, make_student())])
@pytest.mark.parametrize("name", ["ppo", "", "SFT"])
def test_an_unknown_name_is_refused_with_the_known_ones(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"trainer={name} is unknown: use one of pretrain, sft, dpo, orpo, grpo"):
        make(name)


def test_distillation_needs_a_teacher_and_says_so() -> None:
    with pytest.raises(ValueError, match="trainer=distillation needs a teacher"):
        create_trainer("distillation", make_student())


def test_another_trainers_config_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer=orpo needs a config of ORPOConfig, and got one of DPOConfig"):
        create_trainer("orpo", make_student(), config=DPOConfig())
