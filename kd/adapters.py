"""Low-rank adapters (LoRA) beside a model's linear layers: put there, switched off, and merged into the weights.

Source: Hu et al. 2021, arXiv:2106.09685. Their layers are peft's; the model stays the object and of the class it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from kd.checkpoint import holds_adapters
from kd.config import LoRAConfig
from kd.config.adapter import choose_targets
from kd.extras import quiet_import, require_extra
from kd.heads import head_and_embedding

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Put adapters beside linear layers, in place, and freeze all else. They change nothing until they are trained.

    Call it before an optimizer is made. The first matrices are drawn from torch's global random numbers; the second
    ones are 0.

    Args:
        model: A `StudentModel`, or a causal language model of transformers.
        config: Rank, scale, dropout and targets.

    Raises:
        ConfigError: if peft is not installed, or if a target is no linear layer of the model's blocks.
        ValueError: if the model has adapters already.
    """
    require_extra("adapter=lora", config.extra)
    if holds_adapters(model):
        raise ValueError("The model has adapters already: merge_adapters(model) first.")
    unsuitable = head_and_embedding(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = choose_targets(config.targets, [name for name in linears if name not in unsuitable], unsuitable)
    with quiet_import():  # peft may use torchao, and looks for it only when layers are made
        from peft import LoraConfig, inject_adapter_in_model  # here, because it takes seconds

        scale, rate = config.lora_alpha, config.dropout
        inject_adapter_in_model(
            LoraConfig(r=config.rank, lora_alpha=scale, lora_dropout=rate, target_modules=targets), model
        )


def merge_adapters(model: nn.Module) -> None:
    """Add what adapters have learned to the weights beside them, in place, and take them out; all trains again."""
    for name, layer in list(_adapted_layers(model)):
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)  # which would say that there are adapters
    model.requires_grad_(True)


@contextmanager
def as_before_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model be what it was before it got adapters, in eval mode, while the block runs."""
    training = model.training
    layers = [layer for _, layer in _adapted_layers(model)]
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


def _adapted_layers(model: nn.Module) -> "Iterator[tuple[str, LoraLayer]]":
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
