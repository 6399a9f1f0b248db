"""The parts of a training step, written out: loss, perplexity, clipping, schedule, loss scaling.

    python -m kd.tutorial.parts_from_scratch

prints each of them with numbers that can be checked by hand. `trainer_from_scratch.py` puts them together.

中文摘要: 本文件从零实现训练一步所用的各个零件: 交叉熵与困惑度, 按全局范数裁剪梯度, 学习率预热 + 余弦退火,
以及 float16 所需的损失缩放. 运行本文件会用可以手算核对的小例子逐一展示.
它们在 trainer_from_scratch.py 中组合成完整的训练循环.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of a position that is not learned: a prompt's or padding's."""


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum, not the mean, of -log p(label) over the valid positions, in nats (0-d float32).

    Args:
        logits: (B, L, V), any float dtype.
        labels: (B, L) int64; -100 is ignored.
    """
    # In float32 also under autocast: a sum of thousands of exponentials does not fit the 11 bits of float16.
    z = logits.float()  #                                                       (B, L, V)
    valid = labels != IGNORE_INDEX
    targets = labels.masked_fill(~valid, 0)  # gather needs an index in range also where it does not matter
    z_target = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  #               (B, L)
    # p(y) = exp(z_y) / sum_k exp(z_k), so -log p(y) = logsumexp(z) - z_y. logsumexp takes out the maximum first, where
    # log(sum(exp(z))) would overflow from z = 89 on.
    nll = z.logsumexp(dim=-1) - z_target
    return nll.masked_fill(~valid, 0.0).sum()


def count_targets(labels: Tensor) -> int:
    """Return how many positions of labels (B, L) are learned."""
    return int((labels != IGNORE_INDEX).sum())


def perplexity(mean_nll: float) -> float:
    """Return exp(mean -log p): the number of equally likely tokens that would be as hard to guess among."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf  # exp(710) is beyond the largest float


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the length of the gradient of all parameters together, taken as one long vector."""
    # |g| = sqrt(sum over all parameters and entries of g_i^2)
    squares = [parameter.grad.float().square().sum() for parameter in parameters if parameter.grad is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> float:
    """Shorten the gradient to `max_norm` if it is longer, keeping its direction; return the factor, in (0, 1].

    One factor for all parameters: clipping each by itself would turn the gradient into another direction.

    Source: Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063, algorithm 1.
    """
    factor = min(1.0, max_norm / (norm + 1e-6))  # g <- g * max_norm / |g| if |g| > max_norm; 1e-6 as in torch
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return factor


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    The warm-up is there for Adam: its second moment is a mean of very few gradients at first, and full steps divided by
    so rough an estimate can throw the weights far off.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 2.2 (gradual warm-up); Loshchilov and Hutter 2017,
        arXiv:1608.03983, equation 5 without restarts (cosine).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # 1/w, 2/w, ..., 1: step 0 is not lost to a rate of 0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # from 0 up to, but not at, 1
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # eta = (1 + cos(pi * T_cur / T)) / 2


class LossScaler:
    """Keeps gradients inside the range of float16: multiplies the loss, and divides the gradients by the same factor.

    The smallest float16 above 0 is 6e-8, and in a backward pass many gradients are smaller: they would become 0. The
    loss times 65,536 makes every gradient 65,536 times as large, by the chain rule. What becomes too large instead is
    infinity, which is easy to see: that step is not taken, and the factor halved. After long enough without, it is
    doubled. bfloat16 has float32's range and needs none of this.

    Args:
        scale: The first factor, > 0. A power of two changes no digit of a float, only its exponent.
        growth_interval: Steps in a row without overflow after which the factor is doubled.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2 (why to scale, and how to choose the factor).
    """

    def __init__(self, scale: float = 65536.0, growth_interval: float = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self.good_steps = 0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor. Before clipping: a limit on the norm means the true gradient's."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.scale)

    def adapt(self, overflowed: bool) -> None:
        """Halve the factor after an overflow; double it after `growth_interval` good steps in a row."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale *= 0.5
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2.0, 0


def no_scaling() -> LossScaler:
    """Return the scaler of float32 and bfloat16: the factor is 1 and stays 1."""
    return LossScaler(scale=1.0, growth_interval=math.inf)


def rng_state() -> list[Tensor]:
    """Return the state of torch's random numbers, the CPU's and each GPU's: dropout and shuffling follow from it."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_rng_state(states: list[Tensor]) -> None:
    """Go back to a state of the random numbers: the same ones will be drawn again."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


# --- to follow by hand ----------------------------------------------------------------------------------------------


def _parameter_with(gradient: list[float]) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def _show_scaling() -> None:
    scaler = LossScaler(scale=4.0, growth_interval=3)
    for overflowed in (False, True, False, False, False):
        before = scaler.scale
        scaler.adapt(overflowed)
        print(f"   scale {before:g}: {'overflow' if overflowed else 'step taken':10} -> scale {scaler.scale:g}")


def main() -> None:
    """Print what each part does; a second's work."""
    print("1. Cross-entropy. Logits (log 1, log 2, log 5) are probabilities (1/8, 2/8, 5/8); labels 2, 0 and -100:")
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().expand(1, 3, 3)
    labels = torch.tensor([[2, 0, IGNORE_INDEX]])
    total, count = summed_cross_entropy(logits, labels).item(), count_targets(labels)
    by_hand = -math.log(5 / 8) - math.log(1 / 8)
    print(f"   sum {total:.4f} over {count} targets, by hand -log(5/8) - log(1/8) = {by_hand:.4f}")
    print(f"   perplexity {perplexity(total / count):.4f}, by hand 1 / sqrt(5/8 * 1/8) = {1 / math.sqrt(5 / 64):.4f}")

    print("\n2. Clipping to norm 1. Gradients (3) and (0, 4) of two parameters are one of length sqrt(9 + 16) = 5:")
    parameters = [_parameter_with([3.0]), _parameter_with([0.0, 4.0])]
    norm = gradient_norm(parameters)
    factor = clip_by_global_norm(parameters, norm, max_norm=1.0)
    left = [parameter.grad for parameter in parameters if parameter.grad is not None]
    print(f"   norm {norm:g}, factor {factor:.4f}, gradients then {left[0]} and {left[1]}")

    print("\n3. Warm-up over 4 of 12 steps, then half a cosine: quarters up to 1; from 1, by 1/2 at step 8, to near 0:")
    print("   " + " ".join(f"{warmup_cosine(step, 4, 12):.3f}" for step in range(12)))

    print("\n4. Loss scaling. A gradient of 1e-8 in float16, and the same with the loss 65536 times as large:")
    small = torch.tensor(1e-8)
    scaled = (small * 65536).half()
    print(f"   {small.half().item():g}, and {scaled.item():.4g}, which is {scaled.float().item() / 65536:.4g} unscaled")
    print("   The factor adapts: halved after an overflow, doubled after (here) 3 good steps in a row:")
    _show_scaling()


if __name__ == "__main__":
    main()
