"""Continue a prompt with a run's student: `python -m kd.generate RUN "prompt"`."""

import argparse
import io
import os
import sys
from pathlib import Path

from kd.errors import KDError
from kd.openmp import let_threads_sleep


def main() -> None:
    """Run the command line; exit with the code of what went wrong (see `kd.errors`)."""
    os.environ.update(let_threads_sleep(os.environ))  # torch has not been imported yet
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal of few characters cannot show
    try:
        print(generate(sys.argv[1:]))
    except KDError as error:
        print(f"kd-generate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def generate(command_line: list[str]) -> str:
    """Return the prompt of a command line with its continuation.

    Raises:
        KDError: of the kind that fits, if a value is wrong or the run cannot be read.
    """
    arguments = _parser().parse_args(command_line)
    from kd.generation import GenerationConfig, TextGenerator  # here, so that --help does not wait for torch
    from kd.student import load_student

    settings = GenerationConfig(
        strategy=arguments.strategy,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    student = load_student(Path(arguments.run))
    # Bytes that the locale could not read may be UTF-8 after all.
    prompt = str(arguments.prompt).encode(errors="surrogateescape").decode(errors="surrogateescape")
    return prompt + TextGenerator(student.model, student.tokenizer).generate(prompt, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kd-generate", description="Continue a prompt with a run's student.")
    parser.add_argument("run", help="a run's directory, outputs/<name>/<run>, or a checkpoint in it")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--strategy", default="top_p", help="greedy, top_k, top_p (default) or sample")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens to generate (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature, > 0 (1)")
    parser.add_argument("--top-k", type=int, default=50, help="tokens to draw from, for top_k (50)")
    parser.add_argument("--top-p", type=float, default=0.9, help="their joint probability, for top_p (0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    return parser


if __name__ == "__main__":
    main()
