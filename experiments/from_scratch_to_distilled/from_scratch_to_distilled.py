# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From scratch to distilled
#
# Real text becomes tokens, tokens train a teacher, and the teacher trains a student. On the way every claim is checked
# by a number: the size of a model, its loss before it has learned anything, what a teacher says beyond the right
# answer, the gradient of the distillation loss, and the $T^2$ in it. It takes an hour to read and about a minute to
# run, on one CPU core, without network. The text is the source of Python's standard library; your version of it may
# differ from another reader's, and your numbers a little with it.
#
# 从零开始，到蒸馏：真实文本变成词元，词元训练出教师，教师再训练学生。途中每个说法都用数字核对：模型有多大，
# 什么都没学时损失是多少，教师除了正确答案还说了什么，蒸馏损失的梯度，以及其中的 $T^2$。读完约一小时，运行约一分钟，
# 只需一个 CPU 核，不用联网。文本是 Python 标准库的源代码；你的版本可能与别人的不同，数字也会略有差别。
#
# | | | |
# |---|---|---|
# | 1 | The tokenizer | 分词器 |
# | 2 | What a model is asked | 模型要回答的问题 |
# | 3 | The model, counted by hand | 手算模型大小 |
# | 4 | Cross-entropy | 交叉熵 |
# | 5 | What soft targets carry | 软目标里有什么 |
# | 6 | The gradient, and why $T^2$ | 梯度，以及为什么是 $T^2$ |
# | 7 | A run without a teacher, and two with one | 没有教师的训练，和有教师的训练 |
# | 8 | Reading the result | 读懂结果 |

# %%
# %matplotlib inline
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from IPython.display import display
from matplotlib.axes import Axes
from torch import Tensor

from kd.analysis import compare, load_runs, verdict
from kd.analysis.tables import settings_table
from kd.composition import CONFIG_NAME, conf_dir, register_schemas, to_config
from kd.config import ModelConfig, TrainingConfig
from kd.data import PackedBlocks, bpe_content, bpe_tokenizer_directory, build_blocks, read_corpus, train_bpe
from kd.embedded_teacher import load_embedded_teacher
from kd.generation import GenerationConfig, TextGenerator
from kd.losses import causal_lm_loss, distillation_loss
from kd.model import StudentModel, num_parameters
from kd.plan import make_plan
from kd.stop import StopSignal
from kd.student import load_student
from kd.trainers import DistillationTrainer

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
torch.manual_seed(0)
# The notebook's own folder is the working directory in Jupyter; runs and caches belong at the top of the checkout.
for folder in (Path.cwd(), *Path.cwd().parents):
    if (folder / "pyproject.toml").is_file() and (folder / "kd").is_dir():
        os.chdir(folder)
        break

# %% [markdown]
# **Settings.** These are the words that stand behind `python -m kd.train` in part 7. Here the same words give the same
# configuration, so that what we look at is what will be trained. They make the embedded default smaller; change them
# and run the notebook again. With all lines removed but the first, it runs on the embedded default itself, with a
# teacher six times as large: some ten minutes.
#
# **设置。** 第 7 部分里，这些词写在 `python -m kd.train` 后面；在这里它们给出同一份配置，
# 所以我们看到的就是之后要训练的。它们把内置的默认设置缩小；可以改动它们，再运行一遍。只留第一行，
# 就在内置的默认设置上运行，教师有六倍大：约十分钟。

# %%
SETTINGS = [
    "name=from_scratch_to_distilled",
    "data.sample_size=2000000",
    "data.test_ratio=0.15",
    "data.max_train_blocks=120",
    "data.max_eval_blocks=64",
    "model.vocab_size=1024",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "train.batch_size=4",
    "train.num_epochs=6",
    "train.eval_interval=30",
    "teacher.model.hidden_size=128",
    "teacher.model.num_layers=2",
    "teacher.model.num_heads=4",
    "teacher.model.intermediate_size=256",
    "teacher.train.batch_size=4",
    "teacher.train.learning_rate=0.002",
    "teacher.train.warmup_steps=100",
    "teacher.train.max_steps=600",
    "teacher.train.eval_interval=600",
    "teacher.train.save_interval=600",
]
register_schemas()
with initialize_config_dir(conf_dir(), version_base="1.3"):
    config = to_config(compose(CONFIG_NAME, SETTINGS))
display(config.model)

# %% [markdown]
# ## 1. The tokenizer
#
# A model computes with numbers, so text must become numbers. Byte-pair encoding (Sennrich et al. 2016) starts from the
# 256 bytes, finds the pair of neighbours that occurs most often, makes it one token, and repeats. So it is a list of
# merges, in order, and any text can be encoded. Before you run the cell, guess: what are the most frequent pairs in
# Python source?
#
# 模型只会计算数字，所以文本要先变成数字。字节对编码（Sennrich 等，2016）从 256 个字节出发，找出出现最多的相邻两项，
# 把它们合成一个词元，再重复。所以它就是一张有顺序的合并表，任何文本都能编码。运行之前先猜一猜：
# Python 源代码里最常见的相邻对是什么？

# %%
corpus = read_corpus(config.data)
for part in corpus.part_names:
    print(f"{part:>10}: {corpus.num_documents(part):3} files, {corpus.num_bytes(part):9,} bytes")
tokenizer = train_bpe(corpus.texts("train"), config.model.vocab_size)


def shown(token: str) -> str:
    """Return a token of the vocabulary in quotes, so that spaces and line breaks are seen."""
    return repr(tokenizer.decode([tokenizer.convert_tokens_to_ids(token)]))


merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
rows = [*enumerate(merges[:6], 1), *enumerate(merges[-6:], len(merges) - 5)]
pd.DataFrame(
    [(number, shown(left), shown(right), shown(left + right)) for number, (left, right) in rows],
    columns=["merge", "left", "right", "new token"],
).set_index("merge")

# %% [markdown]
# The first merges are indentation; the last ones are pieces of names. Here is a line that the tokenizer was not trained
# on. Frequent words are one token, rare ones several: what is one token here, and what is not?
#
# 最先合并的是缩进，最后合并的是名字的片段。下面是一行没有用来训练分词器的文本。常见的词是一个词元，少见的词是几个：
# 这里哪些是一个，哪些不是？

# %%
lines = (line for text in corpus.texts("validation") for line in text.splitlines())
line = next(line for line in lines if line.startswith("    ") and " = " in line and "(" in line and 55 < len(line) < 75)
ids = tokenizer.encode(line)
print(line, "\n")
print(" ".join(shown(token) for token in tokenizer.convert_ids_to_tokens(ids)), "\n")
print(f"{len(line.encode())} bytes are {len(ids)} tokens")
assert tokenizer.decode(ids) == line

# %% [markdown]
# **How large a vocabulary?** More merges make longer tokens, and so shorter sequences; but every token needs a row in
# the embedding and a column in the softmax. The curve flattens, the cost does not.
#
# **词表要多大？** 合并越多，词元越长，序列越短；但每个词元都要占嵌入矩阵的一行和 softmax 的一列。曲线会变平，代价不会。

# %%
some = list(corpus.texts("validation"))
num_bytes = sum(len(text.encode()) for text in some)
bytes_per_token = {}
for size in sorted({257, 512, 2048, config.model.vocab_size}):
    other = tokenizer if size == config.model.vocab_size else train_bpe(corpus.texts("train"), size)
    bytes_per_token[size] = num_bytes / sum(map(len, other(some, verbose=False)["input_ids"]))

figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axis.plot(list(bytes_per_token), list(bytes_per_token.values()), color=BLUE, marker="o")
for size, value in bytes_per_token.items():
    axis.annotate(f"{value:.2f}", (size, value), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
axis.axvline(config.model.vocab_size, color=GREY, linestyle="--", label="the vocabulary of this notebook")
axis.set(xscale="log", xlabel="vocabulary (tokens, log scale)", ylabel="bytes per token")
axis.set_xticks(list(bytes_per_token), [str(size) for size in bytes_per_token])
axis.minorticks_off()
axis.margins(y=0.15)
axis.set_title("How much text one token holds (files that the tokenizer was not trained on)", fontsize=10)
axis.legend(loc="lower right")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## 2. What a model is asked
#
# All files in a row, an end-of-text token after each, are cut into blocks. A block is a question at every position:
# these tokens so far, which one is next? The labels are the inputs, one further on; no loss shifts them again.
#
# 所有文件首尾相接，每个文件后面加一个结束词元，再切成块。一个块在每个位置上都是一道题：到此为止是这些词元，
# 下一个是哪个？标签就是向后移一位的输入；之后的任何损失都不再移位。

# %%
content = bpe_content(bpe_tokenizer_directory(corpus, config.model.vocab_size))
blocks = build_blocks(corpus, tokenizer, content, config.data.seq_len)
training, held_out = (PackedBlocks(blocks, part) for part in ("train", "validation"))
print(f"{len(training):,} blocks to train on, {len(held_out):,} to validate, {training.seq_len} targets each")
first = held_out[0]
pairs = pd.DataFrame(
    {
        "input": [repr(tokenizer.decode([token])) for token in first["input_ids"][:8].tolist()],
        "label": [repr(tokenizer.decode([token])) for token in first["labels"][:8].tolist()],
    }
)
display(pairs.T)

# %% [markdown]
# ## 3. The model, counted by hand
#
# The student is a small Llama: $H$ wide, with attention whose keys and values are narrower ($G$ wide, since query heads
# share them), a gated feed-forward network of width $I$, and a head that is the embedding itself. No biases. So for $N$
# layers over a vocabulary $V$:
#
# | part | weights |
# |---|---|
# | embedding = head | $V H$ |
# | attention: queries and output, keys and values | $N (2 H^2 + 2 H G)$ |
# | feed-forward: gate, up, down | $N \cdot 3 H I$ |
# | norms: two a layer, one at the end | $(2 N + 1) H$ |
#
# Count the first column yourself, then look.
#
# 学生是一个小的 Llama：宽度 $H$；注意力的键和值更窄（宽度 $G$，因为几个查询头共用它们）；带门的前馈网络宽度为 $I$；
# 输出层就是嵌入矩阵本身；没有偏置。$N$ 层、词表为 $V$ 时，各部分权重数见上表。先自己算出第一列，再往下看。


# %%
def count_by_hand(model: ModelConfig) -> dict[str, int]:
    """Return the weights of each part of a StudentModel."""
    width, layers, kv_width = model.hidden_size, model.num_layers, model.num_kv_heads * model.head_dim
    return {
        "embedding = head": model.vocab_size * width,
        "attention": layers * (2 * width * width + 2 * width * kv_width),
        "feed-forward": layers * 3 * width * model.intermediate_size,
        "norms": (2 * layers + 1) * width,
    }


models = {"this student": config.model, "this teacher": config.teacher.model, "student_120m": ModelConfig()}
counted = pd.DataFrame({name: count_by_hand(model) for name, model in models.items()})
for name, model in models.items():
    with torch.device("meta"):  # shapes without memory
        assert counted[name].sum() == num_parameters(StudentModel(model))
counted.loc["sum"] = counted.sum()
counted.map("{:,}".format)

# %% [markdown]
# In the specified student of 120M more than half of all weights are the embedding: with 151,936 tokens the vocabulary
# is what costs. One more check, which every language model must pass: no position sees a later one. If the last token
# changes, nothing before it may.
#
# 在规格规定的 120M 学生里，一半以上的权重是嵌入矩阵：词表有 151,936 个词元，代价就在词表上。
# 再做一个语言模型都必须通过的检查：任何位置都看不到后面。改变最后一个词元，它前面的一切都不能变。

# %%
student = StudentModel(config.model).eval()
tokens = first["input_ids"][None]
changed = tokens.clone()
changed[0, -1] = (changed[0, -1] + 1) % config.model.vocab_size
with torch.no_grad():
    difference = (student(tokens) - student(changed)).abs().amax(dim=-1)[0]
print(f"largest change of a logit: {difference[:-1].max():.1e} before the last position, {difference[-1]:.1e} at it")
assert difference[:-1].max() < 1e-5 < difference[-1]

# %% [markdown]
# ## 4. Cross-entropy
#
# At each position the model gives $V$ logits $z$; softmax makes them probabilities, and the loss is the surprise at the
# token that came: $-\log p_y = \log \sum_j e^{z_j} - z_y$, in nats, averaged over positions. A model that knows nothing
# gives each token $1/V$, so its loss is $\ln V$. A new model is a little worse than that: its logits are small random
# numbers of variance $\sigma^2$, and $\ln \sum_j e^{z_j} \approx \ln V + \sigma^2/2$. With weights of standard
# deviation 0.02 and hidden vectors of length $\sqrt H$, $\sigma^2 = 0.02^2 H$. If a first loss is not near $\ln V$,
# something is wrong before any training.
#
# 在每个位置上，模型给出 $V$ 个 logits $z$；softmax 把它们变成概率，损失就是对真正出现的词元的惊讶程度：
# $-\log p_y = \log \sum_j e^{z_j} - z_y$，单位是奈特，对所有位置取平均。一无所知的模型给每个词元 $1/V$，
# 损失是 $\ln V$。新模型比这略差：它的 logits 是方差为 $\sigma^2$ 的小随机数，
# 而 $\ln \sum_j e^{z_j} \approx \ln V + \sigma^2/2$。权重标准差为 0.02，隐藏向量长度为 $\sqrt H$，
# 所以 $\sigma^2 = 0.02^2 H$。如果最初的损失不接近 $\ln V$，那么训练之前就有错误。

# %%
batch = PackedBlocks(blocks, "validation", 32)[list(range(32))]  # spread over all of it
labels = batch["labels"]
with torch.no_grad():
    logits = student(batch["input_ids"])
by_hand = (logits.logsumexp(dim=-1) - logits.gather(-1, labels[..., None])[..., 0]).mean()
at_start = causal_lm_loss(logits, labels)
V, H = config.model.vocab_size, config.model.hidden_size
print(f"ln V                     {math.log(V):.4f}")
print(f"ln V + sigma^2/2         {math.log(V) + 0.02**2 * H / 2:.4f}")
print(f"the new model, by hand   {by_hand:.4f}")
print(f"the same, by kd.losses   {at_start:.4f}")
assert abs(by_hand - at_start) < 1e-4
assert abs(at_start - math.log(V)) < 0.05

# %% [markdown]
# **Two more marks on the ruler.** How far can one get without looking at the text so far? As far as the frequencies of
# the tokens go. And how far does the teacher get? It is trained now, on all training blocks, with nothing but this
# cross-entropy: that is pre-training. (About twenty seconds; it is kept in the cache, for part 7 and for your next
# time.)
#
# Loss is quoted in three units. Perplexity, $e^{\text{loss}}$, is the number of equally likely tokens that would be as
# hard to guess. Bits per byte of text do not depend on the tokenizer, so they also compare across vocabularies.
#
# **尺子上再加两个刻度。** 完全不看前文能做到多好？只能靠词元的频率。教师又能做到多好？它现在就在全部训练块上训练，
# 只用这个交叉熵：这就是预训练。（约二十秒；它会留在缓存里，供第 7 部分和你下次使用。）
#
# 损失有三种单位。困惑度 $e^{\text{loss}}$ 是同样难猜的等可能词元的个数。每字节的比特数与分词器无关，
# 所以不同词表之间也能比较。

# %%
plan = make_plan(config)
teacher = load_embedded_teacher(
    config.teacher, plan.fingerprints.teacher, blocks, torch.device("cpu"), StopSignal()
).model
with torch.no_grad():
    teacher_logits = teacher(batch["input_ids"])

counts = torch.bincount(training[list(range(len(training)))]["labels"].flatten(), minlength=V) + 1
frequencies = counts / counts.sum()
losses = {
    "every token equally likely": math.log(V),
    "a new model": float(at_start),
    "frequencies of tokens": float(-frequencies.log()[labels].mean()),
    "the teacher": float(causal_lm_loss(teacher_logits, labels)),
}
pd.DataFrame(
    {
        "loss (nats per token)": losses,
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "bits per byte": {name: loss / math.log(2) * held_out.tokens_per_byte for name, loss in losses.items()},
    }
).round(3)

# %% [markdown]
# ## 5. What soft targets carry
#
# The text says which token came, once. The teacher says how likely each of the $V$ tokens was: a *soft target*.
# Dividing its logits by a temperature $T$ before the softmax, $p_i = e^{t_i/T} / \sum_j e^{t_j/T}$, keeps their order
# and brings the probabilities closer together.
#
# Below are three places of the held-out text, one where the teacher is sure, one in between, one where it is not. (They
# are chosen by entropy, among the places where the right token is one of the six likeliest.) Read a row from left to
# right: what does the right token lose, who gets it, and at which temperature do *all other tokens together* say more
# than the six?
#
# 文本只说出哪个词元出现了，而且只说一次。教师却说出 $V$ 个词元各有多大可能：这就是*软目标*。
# softmax 之前先把 logits 除以温度 $T$，即 $p_i = e^{t_i/T} / \sum_j e^{t_j/T}$，顺序不变，概率彼此更接近。
#
# 下面是没有用来训练的文本中的三个位置：教师很确定的、一般的、不确定的。（按熵挑选，
# 并要求正确的词元在最可能的六个之中。）每一行从左往右看：正确的词元失去了多少，谁得到了，
# 在哪个温度下*其余所有词元加起来*比这六个还多？

# %%
MOST = 6
log_p = teacher_logits.log_softmax(dim=-1)
entropy = -(log_p.exp() * log_p).sum(dim=-1)
is_candidate = (teacher_logits.topk(MOST).indices == labels[..., None]).any(dim=-1)
is_candidate[:, :24] = False  # some text must stand before the place
order = entropy.masked_fill(~is_candidate, math.inf).flatten().argsort()
places = [int(order[int(share * is_candidate.sum())]) for share in (0.1, 0.45, 0.8)]


def label_of(token: int) -> str:
    """Return a token in quotes; of long indentation, how long it is."""
    text = tokenizer.decode([token])
    blanks = len(text) - len(text.rstrip(" "))
    return f"{text[:-blanks]!r} + {blanks} blanks" if blanks > 3 else repr(text)


def draw_target(axis: Axes, place: int, temperature: float) -> None:
    """Draw the teacher's likeliest tokens at a place of the text, and all others together."""
    row, column = divmod(place, labels.size(1))
    likeliest = teacher_logits[row, column].topk(MOST).indices
    p = (teacher_logits[row, column] / temperature).softmax(dim=-1)
    shares = [*p[likeliest].tolist(), 1 - float(p[likeliest].sum())]
    names = [*map(label_of, likeliest.tolist()), f"{V - MOST:,} others"]
    is_right = [*(likeliest == labels[row, column]).tolist(), False]
    colours = [*(ORANGE if right else BLUE for right in is_right[:-1]), GREY]
    axis.barh(range(MOST + 1), shares, color=colours)
    for y, share in enumerate(shares):
        axis.text(share + 0.02, y, f"{share:.3f}" if share < 0.1 else f"{share:.2f}", va="center", fontsize=8)
    axis.set(xlim=(0, 1.15), ylim=(MOST + 0.6, -0.6))
    axis.set_yticks(range(MOST + 1), names, family="monospace", fontsize=8)
    axis.set_xticks([0, 0.5, 1])


figure = plt.figure(figsize=(11, 9), layout="constrained")
figure.suptitle("What the teacher expects next. Orange: the token that came", fontsize=12)
for panel, place in zip(figure.subfigures(3, 1), places, strict=True):
    before = tokenizer.decode(batch["input_ids"][place // labels.size(1), : place % labels.size(1) + 1])
    panel.suptitle(f"after  ...{before[-60:]!r}", fontsize=10, family="monospace")
    for axis, temperature in zip(panel.subplots(1, 3), (1, 2, 4), strict=True):
        draw_target(axis, place, temperature)
        axis.set(title=f"T = {temperature}", xlabel="probability")
plt.show()

# %% [markdown]
# The wrong answers are not all equally wrong, and that is what the student cannot read off a single right answer: which
# tokens could have stood there too. Already at $T = 1$ the teacher says that. Over many positions, below: as $T$ grows,
# the ten likeliest tokens lose nearly everything, and those gain that the teacher itself considers hardly possible,
# over nine hundred of them. By $T = 2$ they have more than half. A high temperature asks the student to learn all of
# these as well.
#
# 错误的答案并不是一样地错，这正是学生从单个正确答案里读不到的：还有哪些词元也可以出现在那里。
# 在 $T = 1$ 时教师已经说出了这一点。下面放到许多位置上看：随着 $T$ 增大，最可能的十个词元几乎失去一切，
# 得到份额的是教师自己也认为几乎不可能的九百多个词元；到 $T = 2$ 它们已占一半以上。温度很高，
# 就等于要求学生把它们也全都学会。

# %%
temperatures = torch.logspace(-1, 4, 41, base=2)
groups = {"the likeliest": (0, 1), "2nd to 10th": (1, 10), "11th to 100th": (10, 100), f"101st to {V:,}th": (100, V)}
ranked = teacher_logits.flatten(0, 1)[::4].sort(dim=-1, descending=True).values
shares: list[list[float]] = []
undecided: list[float] = []
for temperature in temperatures:
    p = (ranked / temperature).softmax(dim=-1)
    shares.append([float(p[:, low:high].sum(dim=-1).mean()) for low, high in groups.values()])
    undecided.append(float(-(p * p.clamp_min(1e-30).log()).sum(dim=-1).mean()))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.stackplot(temperatures, list(zip(*shares, strict=True)), labels=list(groups), colors=(ORANGE, BLUE, GREEN, GREY))
left.set(xlim=(0.5, 16), ylim=(0, 1), ylabel="share of the probability", title="Who has the probability?")
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=9, title="tokens, by their rank")
right.plot(temperatures, undecided, color=BLUE, label="the teacher")
right.axhline(math.log(V), color=GREY, linestyle="--", label=f"all {V:,} tokens equally likely")
right.set(xlim=(0.5, 16), ylim=(0, math.log(V) + 0.6), ylabel="entropy (nats)", title="How undecided is the teacher?")
right.legend(loc="lower right")
for axis in (left, right):
    axis.set(xscale="log", xlabel="temperature T (log scale)")
    axis.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
right.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## 6. The gradient, and why $T^2$
#
# With $p = \text{softmax}(t/T)$ of the teacher and $q = \text{softmax}(s/T)$ of the student, what is to be made small
# is
#
# $$\text{KL}(p \,\|\, q) = \sum_i p_i \log p_i - \sum_i p_i \log q_i,$$
#
# $$\log q_i = \frac{s_i}{T} - \log \sum_j e^{s_j/T}.$$
#
# Only the second sum depends on the student. Since $\partial \log q_i / \partial s_k = \frac{1}{T}(\delta_{ik} - q_k)$
# and the $p_i$ add up to 1,
#
# $$\frac{\partial\, \text{KL}}{\partial s_k} = -\frac{1}{T} \sum_i p_i (\delta_{ik} - q_k) = \frac{1}{T} (q_k - p_k).$$
#
# One factor $1/T$ is there already. The other hides in $q - p$: for large $T$, $e^{x/T} \approx 1 + x/T$, so that
# $q_k - p_k \approx \frac{1}{V T} (\tilde s_k - \tilde t_k)$, where a tilde means that the mean over the vocabulary is
# taken out. So the gradient shrinks as $1/T^2$. Multiplied by $T^2$ it tends to $\frac{1}{V} (\tilde s - \tilde t)$,
# the gradient of a squared difference of logits (Hinton et al. 2015, section 2.1): alpha keeps its meaning, whatever
# the temperature. In that limit every token of the vocabulary counts the same, the hardly possible ones too.
#
# 设教师 $p = \text{softmax}(t/T)$，学生 $q = \text{softmax}(s/T)$，要缩小的是上面的 KL，其中只有第二个和与学生有关。
# 因为 $\partial \log q_i / \partial s_k = \frac{1}{T}(\delta_{ik} - q_k)$，且 $p_i$ 之和为 1，
# 所以梯度是 $\frac{1}{T} (q_k - p_k)$。
#
# 一个因子 $1/T$ 已经在那里，另一个藏在 $q - p$ 里：$T$ 很大时 $e^{x/T} \approx 1 + x/T$，
# 于是 $q_k - p_k \approx \frac{1}{V T} (\tilde s_k - \tilde t_k)$，波浪号表示减去词表上的平均值。
# 所以梯度按 $1/T^2$ 缩小。乘以 $T^2$ 后它趋于 $\frac{1}{V} (\tilde s - \tilde t)$，
# 也就是 logits 平方差的梯度（Hinton 等，2015，2.1 节）：不论温度多少，alpha 的含义都不变。在这个极限里，
# 词表中每个词元的分量都一样，几乎不可能的也不例外。

# %%
s = torch.randn(5, dtype=torch.float64, requires_grad=True)
t = 2 * torch.randn(5, dtype=torch.float64)


def kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher/T || student/T), as written above."""
    p, q = (t / temperature).softmax(dim=-1), (s / temperature).softmax(dim=-1)
    return (p * (p.log() - q.log())).sum(dim=-1)


checks = []
for temperature in (1.0, 2.0, 8.0):
    formula = ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)) / temperature
    (autograd,) = torch.autograd.grad(kl(s, t, temperature), s)
    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    differences = torch.stack([kl(s + step, t, temperature) - kl(s - step, t, temperature) for step in steps]) / 2e-6
    (library,) = torch.autograd.grad(
        distillation_loss(s[None, None], t[None, None], torch.tensor([[0]]), alpha=1.0, temperature=temperature)[0], s
    )
    found = {"autograd": autograd, "finite differences": differences, "kd.losses / T^2": library / temperature**2}
    checks.append({name: float((value - formula).detach().abs().max()) for name, value in found.items()})
    assert max(checks[-1].values()) < 1e-8
print("largest difference from (q - p) / T:")
pd.DataFrame(checks, index=pd.Index([1, 2, 8], name="T")).map("{:.1e}".format)

# %% [markdown]
# **The two losses are one.** The cross-entropy with the text has the gradient $q - y$, where $y$ is 1 at the token that
# came and 0 elsewhere. So at $T = 1$ the whole distillation loss has the gradient $q - (\alpha p + (1 - \alpha) y)$: it
# is a cross-entropy with a *mixture* of the teacher's distribution and the text. Alpha says whom to believe. And if the
# text were drawn from $p$, then $y$ would be $p$ on average: the text's gradient is that of a perfect teacher, and
# noise. A good teacher takes most of the noise away, a bad one puts an error in its place.
#
# **两个损失其实是一个。** 与文本的交叉熵，梯度是 $q - y$，其中 $y$ 在真正出现的词元处为 1，其余为 0。
# 所以在 $T = 1$ 时，整个蒸馏损失的梯度是 $q - (\alpha p + (1 - \alpha) y)$：它就是与教师分布和文本的*混合*的交叉熵。
# alpha 说的是相信谁。如果文本是从 $p$ 中抽取的，那么 $y$ 的平均就是 $p$：文本的梯度等于完美教师的梯度，再加上噪声。
# 好的教师去掉大部分噪声，差的教师带来的是错误。

# %%
alpha, right_token = 0.3, 2
total, terms = distillation_loss(
    s[None, None], t[None, None], torch.tensor([[right_token]]), alpha=alpha, temperature=1.0
)
(gradient,) = torch.autograd.grad(total, s)
mixture = alpha * t.softmax(-1) + (1 - alpha) * torch.eye(5, dtype=torch.float64)[right_token]
print("gradient of the loss:", [f"{value:+.6f}" for value in gradient.tolist()])
print("q minus the mixture: ", [f"{value:+.6f}" for value in (s.softmax(-1) - mixture).tolist()])
assert torch.allclose(gradient, s.softmax(-1) - mixture, atol=1e-8)

# %% [markdown]
# **How large is it, on real text?** The length of the gradient with respect to the logits, averaged over held-out
# positions, for the teacher above and a new student. Without $T^2$ the teacher's voice fades, and next to a
# cross-entropy that knows no temperature alpha would soon mean nothing. With $T^2$ it levels off. But level does not
# mean equal: between $T = 1$ and its limit it still shrinks, here to about a quarter. So temperature moves the balance
# between teacher and text a little, and with SGD or a low clip also the size of a step (AdamW divides out a factor that
# all gradients share). That is one reason to compare settings at more than one learning rate.
#
# The text's line is far above the teacher's: its target is a single token, and $q - y$ has a length near 1 wherever the
# student is not sure of that token. Most of that length is the noise of the last cell.
#
# **在真实文本上它有多大？** 图中是对 logits 的梯度长度，在没有用来训练的位置上取平均，教师如上，学生是新的。
# 没有 $T^2$，教师的声音越来越弱；旁边的交叉熵与温度无关，alpha 很快就失去意义。有了 $T^2$，曲线会变平。
# 但变平不等于相等：从 $T = 1$ 到极限它仍在缩小，这里约缩到四分之一。所以温度会稍稍改变教师与文本之间的平衡；
# 用 SGD 或较低的裁剪阈值时，还会改变步长（AdamW 会除去所有梯度共有的因子）。这是在不止一个学习率下比较设置的一个理由。
#
# 文本的那条线远在教师之上：它的目标是单个词元，只要学生对这个词元没有把握，$q - y$ 的长度就接近 1。这个长度的大部分，
# 就是上一格所说的噪声。

# %%
T = torch.logspace(-1, 6, 29, base=2)
s, t = logits.flatten(0, 1)[::4], teacher_logits.flatten(0, 1)[::4]
plain = torch.stack([((s / x).softmax(-1) - (t / x).softmax(-1)).norm(dim=-1).mean() / x for x in T])
of_text = torch.eye(V)[labels.flatten()[::4]]
cross_entropy = float((s.softmax(-1) - of_text).norm(dim=-1).mean())
limit = float(((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))).norm(dim=-1).mean() / V)

figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
axis.plot(T, T**2 * plain, color=BLUE, linewidth=2, label="$T^2$ KL: the loss used here")
axis.plot(T, plain, color=ORANGE, linewidth=2, linestyle="--", label="KL, without $T^2$")
axis.axhline(cross_entropy, color="black", linewidth=1, label="cross-entropy with the text")
axis.axhline(limit, color=BLUE, linewidth=1, linestyle=":", label="limit of $T^2$ KL: matching logits")
axis.set(xscale="log", yscale="log", xlim=(0.5, 64), xlabel="temperature T (log scale)")
axis.set(ylabel="length of the gradient (log scale)", title="The gradient that reaches the student's logits")
axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32, 64], ["0.5", "1", "2", "4", "8", "16", "32", "64"])
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend()
plt.show()
slope = math.log2(plain[-1] / plain[-5])
print(f"from T = 32 to 64 the plain gradient shrinks by 2^{-slope:.2f}")
print(f"T^2 KL: {plain[4]:.3f} at T = 1, {limit:.3f} in the limit")

# %% [markdown]
# ## 7. A run without a teacher, and two with one
#
# From Python a trainer takes the models, the data and a config; one training step then gives the loss and what it is
# made of.
#
# 在 Python 里，训练器接收模型、数据和配置；一个训练步给出损失以及它的组成部分。

# %%
trainer = DistillationTrainer(
    student, teacher, None, None, TrainingConfig(alpha=0.5, temperature=2.0, warmup_steps=0), "cpu"
)
step = trainer.training_step({name: value[:8] for name, value in batch.items()})
print({name: round(value, 4) for name, value in step.items()})
assert abs(step["loss"] - (0.5 * step["kl_loss"] + 0.5 * step["ce_loss"])) < 1e-5

# %% [markdown]
# Whole runs are commands: they are checked before they start, continue where they were stopped, and are skipped when
# done. This one trains three students from the same random weights on the same text, a small part of what the teacher
# saw: without a teacher (alpha 0), and with the teacher alone (alpha 1) at temperatures 1 and 4.
#
# 完整的训练用命令来做：开始之前先检查，被中断后可以继续，已完成的会跳过。这条命令从同样的随机权重、
# 在同样的文本上（教师所见的一小部分）训练三个学生：没有教师的（alpha 为 0），以及只听教师的（alpha 为 1），
# 温度为 1 和 4。

# %%
arguments = ["-m", "kd.train", "-m", *SETTINGS, "train.alpha=0,1", "train.temperature=1,4"]
print("python", " ".join(arguments), "\n")
answer = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
assert answer.returncode == 0, answer.stderr
print(answer.stdout)

# %% [markdown]
# ## 8. Reading the result
#
# What was printed above is also in `outputs/from_scratch_to_distilled/reports/report.html`, with pictures. From Python,
# `load_runs` gives everything as tables. First the answer in sentences: which setting is best, what it is worth, and
# how sure that is.
#
# 上面打印的内容也在 `outputs/from_scratch_to_distilled/reports/report.html` 里，并配有图。在 Python 里，
# `load_runs` 把一切变成表格。先看用句子写出的答案：哪个设置最好，好多少，有多确定。

# %%
runs = load_runs(f"outputs/{config.name}")
comparison = compare(runs)
for sentence in verdict(comparison):
    print("-", sentence)
table = settings_table(comparison)
pd.DataFrame(table.rows, columns=table.header).set_index("setting")

# %% [markdown]
# How to read it:
#
# - The loss is always the student's plain cross-entropy at temperature 1, whatever it was trained on. Otherwise runs
#   would not compare.
# - The validation part chooses, the test part is quoted: on the text that chose the winner, its number is flattered.
# - The interval comes from the files of the test part. It says how much the difference depends on *which files* were
#   looked at. With one seed it cannot say how much depends on the random start: for that add `seed=0,1,2` to the
#   command.
# - "Gap closed" is the way from the student without a teacher to the teacher, in nats.
#
# 怎样读它：
#
# - 不论训练时用什么损失，这里总是学生在温度 1 下的普通交叉熵，否则各次训练无法比较。
# - 用验证部分来选择，用测试部分来报告：在选出胜者的文本上，胜者的数字会偏乐观。
# - 区间来自测试部分的各个文件，它说明差别在多大程度上取决于*看了哪些文件*。只有一个随机种子时，
#   它说不出有多少取决于随机的起点：要知道这一点，在命令里加上 `seed=0,1,2`。
# - gap closed 是从没有教师的学生到教师的路程中走完的比例，以奈特计。

# %%
series = runs.metrics[runs.metrics["metric"] == "val_loss"]
looks = {(0, 0): ("without a teacher", GREY, "s-"), (1, 1): ("teacher alone, T = 1", BLUE, "o-")}
looks[1, 4] = ("teacher alone, T = 4", ORANGE, "^--")
figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
for (alpha, temperature), curve in series.fillna({"temperature": 0}).groupby(["alpha", "temperature"]):
    label, colour, style = looks.get((alpha, temperature), (f"alpha {alpha:g}, T = {temperature:g}", None, "d:"))
    axis.plot(curve.groupby("step")["value"].mean(), style, color=colour, label=label)
marks = {"every token equally likely": math.log(V), "frequencies of tokens": losses["frequencies of tokens"]}
marks["the teacher"] = math.log(runs.runs["teacher_val_ppl"].dropna().iloc[0])
for name, loss in marks.items():
    axis.axhline(loss, color="black", linewidth=0.8, linestyle=":")
    axis.text(0.99, loss + 0.03, name, ha="right", transform=axis.get_yaxis_transform(), fontsize=9)
axis.set(xlabel="optimizer step", ylabel="validation loss (nats per token)", title="Three students on the same text")
axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# After the first evaluation all three know little more than the frequencies of tokens. Then the one with the teacher at
# $T = 1$ leaves the others behind, on the same few blocks: at every position it is told what could come, where the one
# without a teacher sees a single draw. At $T = 4$ it is the same teacher, and yet nothing is left of the gain (on the
# embedded default, less than half): most of what is asked there are the tokens that hardly ever come, which parts 5 and
# 6 showed. This is a student that has very little text. The more it has of its own, the less a teacher is worth.
#
# What does it sound like? The same beginning, continued by three models. All of them are tiny: look at how they fail.
#
# 在第一次评估时，三个学生所知道的都只比词元的频率多一点。随后，温度为 1、有教师的那个把其他两个甩在后面，
# 用的是同样的几个块：在每个位置上都有人告诉它可能出现什么，而没有教师的只看到一次抽取的结果。$T = 4$ 时是同一个教师，
# 好处却一点不剩（在内置的默认设置上不到一半）：那里要学的大多是几乎不会出现的词元，第 5 和第 6 部分已经说明。
# 这个学生的文本非常少；自己的文本越多，教师的价值就越小。
#
# 它们写出来是什么样？同一个开头，由三个模型续写。它们都很小：看看各自是怎样出错的。

# %%
best, plain = (runs.runs.query(f"{which} and state == 'done'").iloc[0] for which in ("temperature == 1", "alpha == 0"))
writers = {
    "the teacher": teacher,
    "taught by it, T = 1": load_student(Path(best["directory"])).model,
    "without a teacher": load_student(Path(plain["directory"])).model,
}
for name, model in writers.items():
    generator = TextGenerator(model, tokenizer)
    text = generator.generate("    def close(self", GenerationConfig("top_p", 40, top_p=0.8, seed=1))
    print(f"--- {name}\n    def close(self{text}\n")

# %% [markdown]
# ## Where to go from here
#
# Give each try a name of its own in the settings, so that its runs are compared with each other alone.
#
# - Predict, then try: `model.vocab_size=2048` in the settings. What is the first loss, and how many weights come to the
#   student?
# - `train.alpha=0.5`: is half a teacher half as good? Add `seed=0,1,2` before you believe the answer.
# - `data.max_train_blocks=1500`: with more text of its own, what is the teacher still worth?
# - `experiments/alpha_temperature/` asks these questions with 60 runs. `kd/tutorial/` takes the optimizer and the
#   training loop apart; `kd/trainers/README.md` goes on to fine-tuning, preferences and rewards.
# - Your own text and a real teacher: `python -m kd.train data=text data.path=FOLDER teacher=hub teacher.model_id=ID
#   ...`.
#
# 接下来可以做的事。每次尝试都在设置里换一个名字，这样只有它自己的各次训练互相比较。
#
# - 先预测，再尝试：在设置里写 `model.vocab_size=2048`。最初的损失是多少，学生会多出多少权重？
# - `train.alpha=0.5`：半个教师有一半好吗？相信答案之前先加上 `seed=0,1,2`。
# - `data.max_train_blocks=1500`：自己的文本更多时，教师还值多少？
# - `experiments/alpha_temperature/` 用 60 次训练回答这些问题。`kd/tutorial/` 把优化器和训练循环拆开来讲；
#   `kd/trainers/README.md` 接着讲微调、偏好和奖励。
# - 用自己的文本和真正的教师：`python -m kd.train data=text data.path=FOLDER teacher=hub teacher.model_id=ID ...`。
