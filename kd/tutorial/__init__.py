"""How training works, from scratch, with torch alone. Nothing else in `kd` uses this, and it uses nothing else of `kd`.

What is here:

    SGDFromScratch        gradient descent with momentum            optimizer_from_scratch.py
    AdamWFromScratch      Adam with decoupled weight decay          optimizer_from_scratch.py
    LossScaler            what float16's narrow range asks for      parts_from_scratch.py
    TrainerFromScratch    the whole loop: accumulation, clipping,   trainer_from_scratch.py
                          mixed precision, warm-up + cosine,
                          validation, perplexity, checkpoints
    TrainerSettings       its settings                              trainer_from_scratch.py

A path to read it by, in about an hour:

    1. python -m kd.tutorial.optimizer_from_scratch, then the file: how one update is made. Take the first two rows of
       its tables and compute them yourself.
    2. python -m kd.tutorial.parts_from_scratch, then the file: loss and perplexity, clipping, warm-up and cosine, loss
       scaling, each in a few lines.
    3. python -m kd.tutorial.trainer_from_scratch, then the file: how steps become a training run.
    4. experiments/examples/basic_trainer.py: the same with the real trainers, in 40 lines.
    5. kd/trainers/base.py: the real loop. It does what TrainerFromScratch does, in the same order; what it adds is for
       more than one device, for runs that are stopped, and for losses that are no plain cross-entropy.
    6. experiments/examples/custom_trainer.py: a trainer of your own.
    7. experiments/from_scratch_to_distilled/: a notebook on what a teacher adds to all this.

Hints: both optimizers can be given to the real trainers, `PretrainTrainer(model, AdamWFromScratch(model.parameters()),
loader)`. Change a line and run the file again: its last lines compare with torch's own results, so it shows at once
when an update is no longer what the paper says.

中文摘要: 本包只依赖 torch, 从零讲解训练过程. 建议的阅读顺序: 先运行并阅读 optimizer_from_scratch.py
(一次参数更新是怎样算出来的), 再看 parts_from_scratch.py (损失与困惑度, 裁剪, 预热 + 余弦, 损失缩放) 和
trainer_from_scratch.py (完整的训练循环与检查点), 然后是 experiments/examples/ 中用真正训练器写的例子,
最后读 kd/trainers/base.py. 每个文件都可以直接运行, 打印的数字可以手算核对.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.tutorial.optimizer_from_scratch import AdamWFromScratch, SGDFromScratch
    from kd.tutorial.parts_from_scratch import LossScaler
    from kd.tutorial.trainer_from_scratch import TrainerFromScratch, TrainerSettings

_MODULES = {
    "AdamWFromScratch": "optimizer_from_scratch",
    "LossScaler": "parts_from_scratch",
    "SGDFromScratch": "optimizer_from_scratch",
    "TrainerFromScratch": "trainer_from_scratch",
    "TrainerSettings": "trainer_from_scratch",
}

__all__ = ["AdamWFromScratch", "LossScaler", "SGDFromScratch", "TrainerFromScratch", "TrainerSettings"]


def __getattr__(name: str) -> object:
    # At their first use only: a file that is already imported could not be run with `python -m` without a warning.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
