"""Fine-tune a model on prompts and answers with the real trainer: additions, offline, on one CPU core, in seconds.

    python experiments/examples/basic_trainer.py

The model begins with random weights, so that there is nothing to download. To begin with a run of yours instead:
`student = kd.student.load_student(Path("outputs/<name>/<run>"))`, then `student.model` and `student.tokenizer`.
"""

from pathlib import Path

import torch

from kd.config import ModelConfig, SFTConfig
from kd.data import arithmetic_answers, arithmetic_prompts, encode_answers, train_bpe
from kd.data import example_eval_loader as eval_loader
from kd.data import example_train_loader as train_loader
from kd.generation import GenerationConfig, TextGenerator
from kd.model import StudentModel
from kd.trainers import SFTTrainer


def main() -> None:
    """Train on nine tenths of the sums of two-digit numbers; print the loss and some answers on the last tenth."""
    torch.manual_seed(0)
    examples = arithmetic_answers(arithmetic_prompts(digits=2))  # "Sum: 1 2 + 0 7 =" with the answer " 0 1 9"
    train, held_out = examples.part("train"), examples.part("validation")
    # The bytes, the end-of-text token, and what the merges find first: " 1", " 7", ...
    tokenizer = train_bpe([example.prompt + example.response for example in train], vocab_size=271)
    model = StudentModel(ModelConfig(64, 2, 4, 2, 128, vocab_size=271, max_seq_len=16, rope_theta=10000.0))

    config = SFTConfig(batch_size=64, learning_rate=3e-3, warmup_steps=30, num_epochs=9, max_steps=1200)
    trainer = SFTTrainer(
        model,
        train_loader=train_loader(encode_answers(train, tokenizer, max_seq_len=16), config.batch_size, seed=0),
        val_loader=eval_loader(encode_answers(held_out, tokenizer, max_seq_len=16), config.batch_size),
        config=config,
        run_dir=Path("outputs/examples/basic_trainer"),  # checkpoints and history.json
    )
    before = trainer.evaluate()["val_loss"]
    trainer.train()
    print(f"loss on sums never seen: {before:.3f} before, {trainer.evaluate()['val_loss']:.3f} after")
    generator = TextGenerator(model, tokenizer)
    for example in held_out[:20]:
        answer = generator.generate(example.prompt, GenerationConfig(max_new_tokens=4))
        print(f"{example.prompt}{answer}   {'right' if answer == example.response else 'wrong'}")


if __name__ == "__main__":
    main()
