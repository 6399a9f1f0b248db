"""Hugging Face's Llama with a student's weights: the independent implementation that the student is held to."""

from transformers import LlamaConfig, LlamaForCausalLM

from kd.model import StudentModel

LLAMA_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("attention.", "self_attn."),
    ("ffn.", "mlp."),
)


def make_llama(student: StudentModel) -> LlamaForCausalLM:
    """Return Hugging Face's network with the same weights."""
    config = student.config
    llama: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    llama.train(False)
    llama.load_state_dict({llama_name(name): weight for name, weight in student.state_dict().items()})
    return llama


def llama_name(name: str) -> str:
    """Return a weight's name in Hugging Face's network."""
    for ours, theirs in LLAMA_NAMES:
        name = name.replace(ours, theirs)
    return f"model.{name}" if name.startswith("norm.") else name
