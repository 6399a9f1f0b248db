"""The jobs of which `step.py` measures one optimizer step, and the names of the variants."""

from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from kd.config import ModelConfig

PLAIN, TRL, LIVE, CACHED = "plain", "trl", "kd live", "kd cached"
FLOOR_LIVE, FLOOR_CACHED = "floor live", "floor cached"


@dataclass(frozen=True)
class Job:
    """Shapes, the variants that are compared, and what they are held to."""

    teacher: type[PreTrainedModel]
    teacher_config: PreTrainedConfig
    student: ModelConfig
    batch_size: int
    alpha: float
    temperature: float
    variants: tuple[str, ...]
    reference: str
    speed_bars: dict[str, float]
    """At least so many times the reference's speed."""
    memory_bars: dict[str, float]
    """At most so many GB."""
    one_at_a_time: bool


JOBS = {
    "smollm2": Job(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
        ),
        ModelConfig(256, 4, 4, 2, 1024, vocab_size=49152, max_seq_len=128),
        batch_size=8,
        alpha=1.0,
        temperature=1.0,
        variants=(PLAIN, TRL, LIVE, CACHED, FLOOR_LIVE, FLOOR_CACHED),
        reference=TRL,
        speed_bars={LIVE: 1.3, CACHED: 2.5},
        memory_bars={},
        one_at_a_time=False,
    ),
    "specified": Job(
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            tie_word_embeddings=True,
        ),
        ModelConfig(),
        batch_size=8,
        alpha=0.5,
        temperature=2.0,
        variants=(PLAIN, LIVE, CACHED, FLOOR_LIVE, FLOOR_CACHED),
        reference=PLAIN,
        speed_bars={CACHED: 2.0},
        memory_bars={LIVE: 8.0, CACHED: 6.5},
        one_at_a_time=True,
    ),
}
