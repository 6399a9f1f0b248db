"""Instruction pairs from Python source: a function's signature and body, and the first paragraph of its docstring."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from kd.data.corpora import Corpus
from kd.data.examples import AnswerExample, ExampleSet, in_fixed_order
from kd.errors import DataError
from kd.files import digest_of

MARKER = "# What it does:"
"""The line that ends a prompt; the response follows on the same line, as a comment would."""
MAX_CHARS = 340
"""Of prompt and response: most of such pairs fit into 128 tokens of a BPE of 4,096 trained on the same source."""
_FORMAT = 1
_CUT = "    ..."
"""The line that stands for the rest of a longer function."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def instruction_examples(corpus: Corpus, max_chars: int = MAX_CHARS) -> ExampleSet[AnswerExample]:
    """Return the documented functions of a corpus of Python source, in the corpus's own parts.

    Prompt: the function without its docstring, decorators and blank lines, of a long one the first lines, then the
    line `MARKER`. Response: a space and the docstring's first paragraph as one line. Whole files are in one part, and a
    prompt that occurs in several is kept in the last of them alone, so that a held-out prompt was never trained on.
    Documents that the running Python cannot parse are passed over.

    Args:
        corpus: Such as the embedded one.
        max_chars: Longest prompt and response together, in characters.

    Raises:
        DataError: at the first use, if a part has no such function.
    """
    content = {"instructions": _FORMAT, "corpus": corpus.fingerprint, "max_chars": max_chars}
    description = f"the documented functions of {corpus.description}"
    return ExampleSet(description, digest_of(content), lambda: _read_parts(corpus, max_chars))


def instruction_prompt(source: str) -> str:
    """Return the prompt that asks what a function does."""
    return f"{source}\n{MARKER}"


def _read_parts(corpus: Corpus, max_chars: int) -> dict[str, Sequence[AnswerExample]]:
    parts: dict[str, Sequence[AnswerExample]] = {}
    seen: set[str] = set()
    for part in reversed(corpus.part_names):
        found = _new_prompts(_examples(corpus.texts(part), max_chars), seen)
        if not found:
            raise DataError(
                f"The {part} part of {corpus.description} has no Python function with a docstring that "
                f"fits into data.max_chars={max_chars}. Raise that or data.sample_size, or use data=stdlib."
            )
        parts[part] = in_fixed_order(found)
    return {part: parts[part] for part in corpus.part_names}


def _new_prompts(examples: Iterable[AnswerExample], seen: set[str]) -> list[AnswerExample]:
    """Return the examples whose prompts were not seen before, and see them."""
    new: list[AnswerExample] = []
    for example in examples:
        if example.prompt not in seen:
            seen.add(example.prompt)
            new.append(example)
    return new


def _examples(texts: Iterable[str], max_chars: int) -> Iterator[AnswerExample]:
    for text in texts:
        # As the parser counts lines; str.splitlines would also break them at form feeds.
        source = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = source.split("\n")
        pairs = (_example_of(function, lines, max_chars) for function in _functions(source))
        yield from (pair for pair in pairs if pair is not None)


def _functions(text: str) -> Iterator[_Function]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in someone else's string literals
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, _Function))


def _example_of(function: _Function, lines: Sequence[str], max_chars: int) -> AnswerExample | None:
    """Return the pair of a function; None if there is no docstring to learn, or no room for it."""
    docstring = ast.get_docstring(function, clean=False)
    if docstring is None or not _stands_alone(function.body[0], lines):
        return None
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    # A single word like "Internal" says nothing of the function.
    if " " not in paragraph:
        return None
    header, body = _source(function, function.body[0], lines)
    room = max_chars - len(instruction_prompt("")) - len(paragraph) - 1
    source = _cut(header, body, room)
    return None if source is None else AnswerExample(instruction_prompt(source), f" {paragraph}")


def _stands_alone(docstring: ast.stmt, lines: Sequence[str]) -> bool:
    """Return whether no code shares the docstring's lines."""
    assert docstring.end_lineno is not None
    assert docstring.end_col_offset is not None
    # Columns count bytes of UTF-8.
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].strip()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].strip()
    return not before and (not after or after.startswith(b"#"))


def _source(function: _Function, docstring: ast.stmt, lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a function's dedented lines before and after its docstring, without blank ones."""
    header = [line.rstrip() for line in lines[function.lineno - 1 : docstring.lineno - 1] if line.strip()]
    body = [line.rstrip() for line in lines[docstring.end_lineno : function.end_lineno] if line.strip()]
    dedented = textwrap.dedent("\n".join([*header, *body])).split("\n")
    return dedented[: len(header)], dedented[len(header) :]


def _cut(header: Sequence[str], body: Sequence[str], room: int) -> str | None:
    """Return as many whole lines as fit into `room` characters, and "..." for the rest; None if not even the header."""
    whole = "\n".join([*header, *body])
    if len(whole) <= room:
        return whole
    sizes = accumulate(len(line) + 1 for line in (*header, _CUT, *body))
    fitting = sum(size <= room + 1 for size in sizes) - len(header) - 1
    return "\n".join([*header, *body[:fitting], _CUT]) if fitting >= 0 else None
