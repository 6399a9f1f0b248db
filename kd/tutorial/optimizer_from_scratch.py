"""SGD with momentum and AdamW, written out: each formula stands beside the line that computes it.

    python -m kd.tutorial.optimizer_from_scratch

prints the first updates of both, which can be followed with a pocket calculator, what decoupling the weight decay
changes, and how far 100 steps on a small network stray from those of torch.optim.

中文摘要: 本文件从零实现带动量的 SGD 和 AdamW, 每个公式都写在对应的代码行旁边. 两者都是 torch.optim.Optimizer 的子类,
所以参数组, 学习率调度器, state_dict 和真正的训练器都可以直接使用. 运行本文件会打印可以手算核对的前几步,
解耦权重衰减与 L2 正则的区别, 以及 100 步之后与 torch 结果的差距 (只有舍入误差).
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""Parameters, or groups of them: dicts with `params` and whatever differs from the optimizer's defaults."""
Closure = Callable[[], float]


class SGDFromScratch(Optimizer):
    """Stochastic gradient descent with (heavy-ball) momentum, as torch.optim.SGD defines it.

        g <- gradient + weight_decay * theta        the gradient of loss + weight_decay / 2 * |theta|^2
        v <- momentum * v + g                       the velocity; the first one is g
        theta <- theta - lr * v

    With a constant gradient v grows to g / (1 - momentum): momentum 0.9 takes steps up to ten times as long as without.

    The papers keep the learning rate inside the velocity (v <- momentum * v - lr * g, theta <- theta + v). With one
    learning rate for all steps that is the same. With a schedule it is not: there, a step taken at a high rate goes on
    at that rate; here, and in torch, a lower rate slows the whole velocity at once.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate, >= 0.
        momentum: In [0, 1); 0 is plain gradient descent.
        weight_decay: Of the L2 penalty, >= 0.

    Raises:
        ValueError: if a value is out of range.

    Source: Polyak 1964 (heavy ball); Sutskever, Martens, Dahl and Hinton 2013 (ICML), equations 1 and 2.
    """

    def __init__(self, params: Parameters, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        _require(lr >= 0, "lr", lr, "it must be 0 or more")
        _require(0 <= momentum < 1, "momentum", momentum, "it must be in [0, 1)")
        _require(weight_decay >= 0, "weight_decay", weight_decay, "it must be 0 or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what the closure returns, if there is one.

        `optimizer.state[parameter]["velocity"]` then holds v.
        """
        loss = _call(closure)
        for group in self.param_groups:
            for theta in _with_gradients(group):
                # Read from the group at every step: that is where a schedule changes the learning rate.
                self._update(theta, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, theta: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[theta]
        assert theta.grad is not None
        g = theta.grad + weight_decay * theta  #                  g_t = grad f(theta_t-1) + lambda theta_t-1
        if "velocity" in state:
            state["velocity"].mul_(momentum).add_(g)  #           v_t = mu v_t-1 + g_t         (Sutskever 2013, eq. 1)
        else:
            state["velocity"] = g  #                              v_1 = g_1, as if v_0 were 0
        theta.sub_(lr * state["velocity"])  #                     theta_t = theta_t-1 - lr v_t (Sutskever 2013, eq. 2)


class AdamWFromScratch(Optimizer):
    """Adam with decoupled weight decay, as torch.optim.AdamW defines it.

        m <- beta1 * m + (1 - beta1) * g            first moment: a running mean of the gradient
        v <- beta2 * v + (1 - beta2) * g^2          second moment: a running mean of its square, entry by entry
        m_hat = m / (1 - beta1^t)                   both begin at 0 and are too small at first, by exactly
        v_hat = v / (1 - beta2^t)                   these factors: the bias correction
        theta <- theta - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta)

    m_hat / sqrt(v_hat) is about 1 in size where the gradient keeps its sign, and near 0 where it swings: lr is the
    length of a step of each weight, whatever the gradient's scale. So the very first step is lr * sign(g).

    "Decoupled": weight_decay * theta is not a part of g. If it were (L2 in plain Adam), it would be divided by
    sqrt(v_hat) too, and the weights with the largest gradients would decay least.

    The paper multiplies the decay by the schedule alone (eta_t), torch by the whole learning rate (eta_t * alpha).
    Here it is as in torch: the default weight_decay of 0.01 with lr 0.001 is the paper's lambda of 0.00001.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate, >= 0: the paper's eta_t * alpha.
        betas: Of the two running means, each in [0, 1); 1 / (1 - beta) is roughly how many steps they look back.
        eps: Keeps the division finite, >= 0.
        weight_decay: Share of the weights that lr = 1 would take away in a step, >= 0.

    Raises:
        ValueError: if a value is out of range.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2 (decay); Kingma and Ba 2015, arXiv:1412.6980,
        algorithm 1 (moments) and section 3 (bias correction).
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        _require(lr >= 0, "lr", lr, "it must be 0 or more")
        _require(all(0 <= beta < 1 for beta in betas), "betas", betas, "each must be in [0, 1)")
        _require(eps >= 0, "eps", eps, "it must be 0 or more")
        _require(weight_decay >= 0, "weight_decay", weight_decay, "it must be 0 or more")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what the closure returns, if there is one.

        `optimizer.state[parameter]` then holds `step` (t), `first_moment` (m) and `second_moment` (v).
        """
        loss = _call(closure)
        for group in self.param_groups:
            for theta in _with_gradients(group):
                self._update(theta, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return loss

    def _update(self, theta: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        beta1, beta2 = betas
        g, state = theta.grad, self.state[theta]
        assert g is not None
        if not state:
            # t counts the steps of this parameter: one without a gradient makes none.
            state.update(step=0, first_moment=torch.zeros_like(theta), second_moment=torch.zeros_like(theta))
        state["step"] += 1  #                                     t <- t + 1
        t, m, v = state["step"], state["first_moment"], state["second_moment"]
        m.mul_(beta1).add_((1 - beta1) * g)  #                    m_t = beta1 m_t-1 + (1 - beta1) g_t
        v.mul_(beta2).add_((1 - beta2) * g * g)  #                v_t = beta2 v_t-1 + (1 - beta2) g_t^2
        m_hat = m / (1 - beta1**t)  #                             m_hat_t = m_t / (1 - beta1^t)
        v_hat = v / (1 - beta2**t)  #                             v_hat_t = v_t / (1 - beta2^t)
        # theta_t = theta_t-1 - lr (m_hat_t / (sqrt(v_hat_t) + eps) + lambda theta_t-1), in two parts. The decay as a
        # factor, as torch has it: float32 rounds 1 - lr lambda by up to 3e-8, the same way at each step, so that
        # subtracting lr lambda theta would be a little more exact, and some 1e-6 away from torch after 100 steps.
        theta.mul_(1 - lr * weight_decay)  #                      theta <- (1 - lr lambda) theta_t-1
        theta.sub_(lr * m_hat / (v_hat.sqrt() + eps))  #          theta_t = theta - lr m_hat_t / (sqrt(v_hat_t) + eps)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is not allowed: {allowed}.")


def _call(closure: Closure | None) -> float | None:
    """Some optimizers compute the loss again while they step; ours only need it to fit in their place."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradients(group: dict[str, Any]) -> list[nn.Parameter]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


# --- to follow by hand ---------------------------------------------------------------------------------------------

Make = Callable[[Parameters], Optimizer]


def descend(make: Make, steps: int) -> list[dict[str, float]]:
    """Minimise f(theta) = theta^2 / 2 from theta = 1, where the gradient is theta itself.

    Returns:
        For each step: the gradient `g` that it saw, `theta` after it, and the optimizer's state after it, by name.
    """
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([theta])
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        (theta**2 / 2).sum().backward()  # type: ignore[no-untyped-call]
        g = theta.item()
        optimizer.step()
        rows.append({"g": g, **{k: float(x) for k, x in optimizer.state[theta].items()}, "theta": theta.item()})
    return rows


def what_decay_leaves(make: Make) -> float:
    """Return what 100 steps leave of a weight 1 whose gradient is 10, -10, 10, ...: large, but leading nowhere."""
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([theta])
    for step in range(100):
        theta.grad = torch.full_like(theta, 10.0 * (-1) ** step)
        optimizer.step()
    return theta.item()


def distance(ours: Make, theirs: Make, dtype: torch.dtype, steps: int = 100) -> float:
    """Train the same small network with two optimizers; return the largest difference of any weight at any step."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8, dtype=dtype), torch.randn(64, 1, dtype=dtype)
    first = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    second = copy.deepcopy(first)
    pairs = [(first, ours(first.parameters())), (second, theirs(second.parameters()))]
    worst = 0.0
    for _ in range(steps):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        gaps = [(a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
        worst = max(worst, *gaps)
    return worst


def _show(rows: list[dict[str, float]]) -> None:
    print("  " + "".join(f"{name:>15}" for name in rows[0]))
    for row in rows:
        print("  " + "".join(f"{value:15.6f}" for value in row.values()))


def main() -> None:
    """Print what the two optimizers do; a second's work."""
    print("1. SGD, lr 0.1, momentum 0.9, on f(theta) = theta^2 / 2 from theta = 1. By hand:")
    print("   v1 = 1, theta1 = 1 - 0.1 * 1 = 0.9;  v2 = 0.9 * 1 + 0.9 = 1.8, theta2 = 0.9 - 0.1 * 1.8 = 0.72")
    _show(descend(lambda params: SGDFromScratch(params, lr=0.1, momentum=0.9), 4))

    print("\n2. AdamW, lr 0.1, no decay, on the same. By hand: m1 = 0.1 and v1 = 0.001; corrected, both are 1;")
    print("   so theta1 = 1 - 0.1 * 1 / sqrt(1) = 0.9: lr * sign(g), for a gradient of any size")
    _show(descend(lambda params: AdamWFromScratch(params, lr=0.1, weight_decay=0.0), 4))

    print("\n3. Decay, lr 0.01, weight_decay 0.1, of a weight 1 whose gradient is 10, -10, 10, ..., after 100 steps,")
    print("   as a share of what is left without decay:")
    bare = what_decay_leaves(lambda params: AdamWFromScratch(params, lr=0.01, weight_decay=0.0))
    coupled = what_decay_leaves(lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1))
    decoupled = what_decay_leaves(lambda params: AdamWFromScratch(params, lr=0.01, weight_decay=0.1))
    print(f"   as a part of the gradient in Adam  {coupled / bare:.4f}  (the decay too is divided by sqrt(v_hat) = 10)")
    print(f"   decoupled, in AdamW                {decoupled / bare:.4f}  (by hand: 0.999^100 = {0.999**100:.4f})")

    print("\n4. The largest difference of any weight from torch's own, over 100 steps of a small network. What float32")
    print("   shows must vanish in float64, or it is no rounding:")
    for dtype in (torch.float32, torch.float64):
        sgd = distance(_sgd, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01), dtype)
        adamw = distance(AdamWFromScratch, torch.optim.AdamW, dtype)
        print(f"   {dtype!s:14} SGD {sgd:.1e}   AdamW {adamw:.1e}")


def _sgd(params: Parameters) -> Optimizer:
    return SGDFromScratch(params, lr=0.05, momentum=0.9, weight_decay=0.01)


if __name__ == "__main__":
    main()
