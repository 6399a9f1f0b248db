"""A causal language model as two parts: its body, and the linear head that turns hidden states into logits.

What costs memory and time in distillation is the vocabulary. With both parts apart, losses are computed without full
logits, and a teacher's hidden states can be kept instead of its logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import ConfigError
from kd.model import StudentModel

SOFTCAP_KEY = "final_logit_softcapping"
"""Under which transformers' configurations name the bound of `softcap * tanh(logits / softcap)`."""
PROBE_TOKENS = 8
ROUNDING = 32
"""Logits computed in another order may differ by so many units in the last place of the largest."""


@dataclass(frozen=True)
class LinearHead:
    """What turns hidden states into logits: softcap * tanh((hidden @ weight.T + bias) / softcap), or without a softcap
    just what is in the inner brackets.
    """

    weight: Tensor
    """(V, H)."""
    bias: Tensor | None = None
    """(V,)."""
    softcap: float | None = None
    """Bound of the logits' absolute value."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.weight.size(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., H)."""
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class NoLinearHeadError(ValueError):
    """A model's logits are not a linear function of hidden states, as far as can be seen; the text says why."""


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """What transformers' causal language models offer."""

    config: Any

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head."""
        ...


@runtime_checkable
class HasEmbeddings(Protocol):
    """What transformers' causal language models offer."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head."""
        ...


@runtime_checkable
class CanCheckpoint(Protocol):
    """What transformers' models offer that can trade time for memory."""

    supports_gradient_checkpointing: bool

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Switch it on."""
        ...


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, a mapping with "logits", or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    logits = output["logits"] if isinstance(output, Mapping) else output.logits
    assert isinstance(logits, Tensor)
    return logits


class SplitModel:
    """A model's body and head; both stay the model's own.

    Scaling of the logits behind the head (as Cohere and Granite have it) is part of the hidden states here.

    Args:
        model: A `StudentModel`, or a causal language model of transformers. Any but a StudentModel is tried out on a
            few made-up tokens, where it must give the logits that its parts give.

    Raises:
        NoLinearHeadError: if the model's head is not a plain nn.Linear, or does not give the model's logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._text_config: Any = None
        self._softcap: float | None = None
        self._body: Callable[[Tensor], Tensor]
        if isinstance(model, StudentModel):
            self._linear, self._body = model.lm_head, model.hidden_states
            return
        self._linear, self._body = _find_linear(model), self._run_without_head
        if isinstance(model, HasOutputEmbeddings):
            self._text_config = model.config.get_text_config()
            self._softcap = self._text_config.to_dict().get(SOFTCAP_KEY)
        self._check()

    @property
    def head(self) -> LinearHead:
        """The head, with the parameters that it has now."""
        return LinearHead(self._linear.weight, self._linear.bias, self._softcap)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Return what the head sees, (B, L, H), for input_ids (B, L); with a graph if gradients are enabled."""
        return self._body(input_ids)

    def compile_body(self) -> None:
        """Let torch compile the body at its first call."""
        self._body = torch.compile(self._body)

    def _run_without_head(self, input_ids: Tensor) -> Tensor:
        with _head_as_identity(self._linear), _without_softcap(self._text_config, self._softcap):
            hidden = logits_of(self._model(input_ids))
        return hidden.to(self._linear.weight.dtype)  # some models return logits in float32, whatever they compute in

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the parts with the whole."""
        rows = self._linear.out_features
        tokens = (torch.arange(PROBE_TOKENS, device=self._linear.weight.device) * 7 % rows).unsqueeze(0)
        training = self._model.training
        self._model.eval()
        try:
            expected = logits_of(self._model(tokens)).float()
            found = self.head.logits(self.hidden(tokens)).float()
        except (RuntimeError, TypeError, ValueError) as error:
            raise NoLinearHeadError(f"it does not run without its head: {error}") from error
        finally:
            self._model.train(training)
        if expected.shape != found.shape:
            raise NoLinearHeadError(f"its head gives {found.size(-1)} logits and the model {expected.size(-1)}")
        # Where the model overflows there is nothing to compare; whoever uses its logits will notice.
        finite = torch.isfinite(expected) & torch.isfinite(found)
        largest = expected.where(finite, 0).abs().max()
        bound = ROUNDING * torch.finfo(self._linear.weight.dtype).eps * largest
        if ((expected - found).where(finite, 0).abs() > bound).any():
            raise NoLinearHeadError("its logits are not those of its head alone: something else changes them")


def head_and_embedding(model: nn.Module) -> list[str]:
    """Return the names of a model's head and embedding; nothing of a model that does not say which these are."""
    if isinstance(model, StudentModel):
        ends: tuple[nn.Module | None, ...] = (model.lm_head, model.embedding)
    elif isinstance(model, HasEmbeddings):
        ends = (model.get_output_embeddings(), model.get_input_embeddings())
    else:
        return []
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let a model compute its blocks' activations again in the backward pass, instead of keeping them.

    Raises:
        ConfigError: if it is neither a `StudentModel` nor a model of transformers that can do so.
    """
    if isinstance(model, StudentModel):
        model.gradient_checkpointing = True
    elif isinstance(model, CanCheckpoint) and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise ConfigError(
            f"train.gradient_checkpointing=true, but {type(model).__name__} does not say how: set it to false."
        )


def _find_linear(model: nn.Module) -> nn.Linear:
    if not isinstance(model, HasOutputEmbeddings):
        raise NoLinearHeadError(f"{type(model).__name__} does not say which module is its head")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # a subclass may compute anything
        raise NoLinearHeadError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a plain nn.Linear")
    return head


@contextmanager
def _head_as_identity(head: nn.Linear) -> Iterator[None]:
    """Let a head return its input while the block runs.

    The model runs as it is, so that all it does to hidden states on their way to the head, and all scaling behind it,
    is in the result; and no product with the vocabulary is computed.
    """
    before = head.__dict__.get("forward")  # set there by libraries that wrap modules
    head.__dict__["forward"] = _identity
    try:
        yield
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _identity(hidden: Tensor) -> Tensor:
    return hidden


@contextmanager
def _without_softcap(config: Any, softcap: float | None) -> Iterator[None]:
    """Switch off a model's soft-capping while the block runs: it comes after the head."""
    if softcap is None:
        yield
        return
    config.final_logit_softcapping = None
    try:
        yield
    finally:
        config.final_logit_softcapping = softcap
