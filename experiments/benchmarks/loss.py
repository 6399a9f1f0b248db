"""How fast and how small is the distillation loss without logits?

    python experiments/benchmarks/loss.py

Compares forward and backward of `linear_distillation_loss` with the four matrix products alone, plain PyTorch on full
logits, and Liger-Kernel's chunked distillation loss, where that is installed (`pip install -e ".[bench]"`; it has no
T^2, which its soft weight makes up for). The products stand there twice: as `torch.mm` computes them, which is what the
others call, and tile by tile with the functions that kd calls: nothing is left of kd there but its element-wise work.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import MIB, Measurement, add_common_arguments, compare, save, serve, table

from kd.head_products import Sum, add_gradients, project
from kd.linear_distillation import ACCELERATOR_TILING, CPU_TILING, linear_distillation_loss
from kd.losses import distillation_loss
from kd.tiles import Tiling

FLOOR, TILED, PLAIN, OURS, LIGER = "matrix products", "kd's products", "plain", "kd", "liger"


@dataclass
class Problem:
    """Inputs of one loss: hidden states (N, H), head weights (V, H) and labels (N,)."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    alpha: float
    temperature: float

    @staticmethod
    def random(args: argparse.Namespace) -> "Problem":
        """Draw inputs whose logits have a standard deviation of about 3."""
        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int, std: float) -> Tensor:
            # In place, for the sake of the memory's base line.
            empty = torch.empty(rows, width, device=device, dtype=dtype)
            return empty.normal_(0, std, generator=generator)

        return Problem(
            normal(args.tokens, args.student_width, 1).requires_grad_(),
            normal(args.vocab, args.student_width, 3 * args.student_width**-0.5).requires_grad_(),
            normal(args.tokens, args.teacher_width, 1),
            normal(args.vocab, args.teacher_width, 3 * args.teacher_width**-0.5),
            torch.randint(args.vocab, (args.tokens,), generator=generator, device=device),
            args.alpha,
            args.temperature,
        )

    def backward(self, loss: Tensor) -> float:
        """Differentiate, forget the gradients and return the loss."""
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        self.student.grad = self.student_weight.grad = None
        return value


def matrix_products(problem: Problem) -> Callable[[], float]:
    """The four products that no implementation can do without, by torch.mm, as large as they come."""
    weight, hidden = problem.student_weight.detach(), problem.student.detach()
    logits = torch.empty(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
    by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def repetition() -> float:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(problem.teacher, problem.teacher_weight.T, out=logits)
        torch.mm(logits, weight, out=by_hidden)
        torch.mm(logits.T, hidden, out=by_weight)
        return float("nan")

    return repetition


def tiled_products(problem: Problem, tiling: Tiling) -> Callable[[], float]:
    """The same products in kd's tiles, by kd's functions."""
    weight, hidden = problem.student_weight.detach(), problem.student.detach()
    memory = torch.empty(tiling.vocabulary * tiling.tokens, device=hidden.device, dtype=hidden.dtype)
    by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight)
    chunks = torch.arange(len(hidden)).split(tiling.tokens)
    tiles = torch.arange(len(weight)).split(tiling.vocabulary)
    slices = [(slice(c[0], c[-1] + 1), slice(t[0], t[-1] + 1)) for c in chunks for t in tiles]

    def repetition() -> float:
        for tokens, entries in slices:
            tile = memory[: len(weight[entries]) * len(hidden[tokens])].view(-1, len(hidden[tokens]))
            project(weight[entries], hidden[tokens], tile)
            project(problem.teacher_weight[entries], problem.teacher[tokens], tile)
            sums = Sum(by_weight[entries], tokens.start == 0), Sum(by_hidden[tokens], entries.start == 0)
            add_gradients(tile, weight[entries], hidden[tokens], *sums)
        return float("nan")

    return repetition


def plain(problem: Problem) -> Callable[[], float]:
    """PyTorch on full logits."""

    def repetition() -> float:
        student = F.linear(problem.student, problem.student_weight)
        teacher = F.linear(problem.teacher, problem.teacher_weight)
        loss, _ = distillation_loss(student, teacher, problem.labels, problem.alpha, problem.temperature)
        return problem.backward(loss)

    return repetition


def ours(problem: Problem, tiling: Tiling | None) -> Callable[[], float]:
    """The loss without logits."""

    def repetition() -> float:
        loss, _ = linear_distillation_loss(
            problem.student,
            problem.student_weight,
            problem.teacher,
            problem.teacher_weight,
            problem.labels,
            problem.alpha,
            problem.temperature,
            tiling=tiling,
        )
        return problem.backward(loss)

    return repetition


def liger(problem: Problem, chunk_size: int, compiled: bool) -> Callable[[], float]:
    """Liger-Kernel's chunked loss with beta 0, the forward KL."""
    from liger_kernel.chunked_loss import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        LigerFusedLinearJSDLoss,
    )

    if compiled and problem.labels.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ModuleNotFoundError(name="a C++ compiler")
    loss_fn = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - problem.alpha,
        weight_soft_loss=problem.alpha * problem.temperature**2,
        beta=0.0,
        temperature=problem.temperature,
        compiled=compiled,
        chunk_size=chunk_size,
    )

    def repetition() -> float:
        loss = loss_fn(problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, problem.labels)
        return problem.backward(loss)

    return repetition


def prepare(args: argparse.Namespace) -> Callable[[], float]:
    """Return the repetition of the variant: NAME, `kd TOKENSxENTRIES` or `liger CHUNK [compiled]`."""
    problem = Problem.random(args)
    name, _, detail = args.variant.partition(" ")
    if args.variant == FLOOR:
        return matrix_products(problem)
    if args.variant == TILED:
        return tiled_products(problem, CPU_TILING if args.device == "cpu" else ACCELERATOR_TILING)
    if name == PLAIN:
        return plain(problem)
    if name == LIGER:
        return liger(problem, int(detail.split()[0]), "compiled" in detail)
    sizes = [int(size) for size in detail.split("x")] if detail else None
    return ours(problem, None if sizes is None else Tiling(*sizes))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--student-width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--more-tokens", type=int, default=4096, help="for one repetition that shows memory; 0: none")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--tilings", nargs="*", default=[], help="also measure these, as TOKENSxENTRIES")
    parser.add_argument("--liger-chunks", nargs="*", default=["128", "256", "1024", "256 compiled", "1024 compiled"])
    parser.add_argument("--name", help="of the result files; default: loss-DEVICE-DTYPE")
    return parser.parse_args()


def main() -> None:
    """Measure all variants, print the table and write the files."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.variant is not None:
        serve(lambda: prepare(args), torch.device(args.device), unmeasured=1)
        return
    shared = ["device", "dtype", "threads", "vocab", "student_width", "teacher_width", "alpha", "temperature"]
    settings = {name: getattr(args, name) for name in shared}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    variants = [
        FLOOR,
        TILED,
        PLAIN,
        OURS,
        *(f"{OURS} {t}" for t in args.tilings),
        *(f"{LIGER} {c}" for c in args.liger_chunks),
    ]
    results = compare(__file__, variants, [*arguments, f"--tokens={args.tokens}"], args.rounds)
    print(table(results, PLAIN, FLOOR))
    if args.more_tokens:
        more = compare(__file__, [OURS], [*arguments, f"--tokens={args.more_tokens}"], 1)[0]
        print(f"{OURS} at {args.more_tokens} tokens: {more.extra_bytes / MIB:.0f} MiB")
        results.append(Measurement(f"{OURS}, {args.more_tokens} tokens", more.seconds, more.extra_bytes, more.value))
    title = f"Distillation loss, forward and backward: {args.tokens} tokens, V={args.vocab}, {args.device} {args.dtype}"
    settings |= {"tokens": args.tokens, "rounds": args.rounds}
    save(args.name or f"loss-{args.device}-{args.dtype}", settings, results, title)


if __name__ == "__main__":
    main()
