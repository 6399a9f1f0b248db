"""A run's result in words."""

from collections.abc import Iterator
from typing import Any


def headline(result: dict[str, Any]) -> str:
    """Return the number that a result is known by: the validation perplexity or, where there is none, the loss."""
    if result.get("val_ppl") is not None:
        return f"validation perplexity {result['val_ppl']:.2f}"
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
