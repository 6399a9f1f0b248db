"""A run's result in words, and the one number by which runs are chosen."""

from collections.abc import Iterator, Mapping
from typing import Any


def objective(result: Mapping[str, Any], part: str = "val") -> float:
    """Return the number by which runs are chosen, the lower the better; a sweep hands it to Hydra.

    It means the same whatever the training's settings: the loss where that is a cross-entropy (nats per token) or a
    negative reward; of preferences the share of pairs that are ranked wrongly, since their loss is scaled by the run's
    own beta and label smoothing.

    Args:
        result: A run's final numbers by name, as in result.json.
        part: `val` or `test`.
    """
    accuracy = result.get(f"{part}_reward_accuracy")
    return float(result[f"{part}_loss"]) if accuracy is None else 1.0 - float(accuracy)


def headline(result: dict[str, Any]) -> str:
    """Return the number that a result is known by: validation perplexity, reward accuracy, or else the loss."""
    if result.get("val_ppl") is not None:
        return f"validation perplexity {result['val_ppl']:.2f}"
    if result.get("val_reward_accuracy") is not None:
        return f"validation reward accuracy {result['val_reward_accuracy']:.4f}"
    return f"validation loss {result['val_loss']:.4f}"


def sentences(result: dict[str, Any]) -> Iterator[str]:
    """Yield what a result says of the model, a line each."""
    if "val_ppl" in result:
        yield _perplexities(result)
        return
    for prefix, part in (("val_", "Validation"), ("test_", "Test"), ("quantized_val_", "With integer weights")):
        known = {name: value for name, value in result.items() if name.startswith(prefix) and value is not None}
        values = (f"{name.removeprefix(prefix).replace('_', ' ')} {value:.4f}" for name, value in known.items())
        if known:
            yield f"{part}: {', '.join(values)}"


def _perplexities(result: dict[str, Any]) -> str:
    teacher, test = result["teacher_val_ppl"], result["test_ppl"]
    text = headline(result).capitalize()
    text += "" if test is None else f", test {test:.2f}"
    if "quantized_val_ppl" in result:
        text += f"; with integer weights {result['quantized_val_ppl']:.2f}"
    return text if teacher is None else f"{text} (teacher, validation: {teacher:.2f})"
