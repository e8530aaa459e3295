"""Full-vocabulary distillation by TRL's GKD trainer, for comparison; runs in an environment of its own.

    python trl_gkd.py JSON

JSON: teacher, student (Llama shapes: layers, hidden, heads, kv_heads, ffn), vocab_size, sequence_length, batch_size,
steps, threads. Prints one JSON list: the time at the end of each step, seconds. Text is what GKD calls off-policy: a
fixed data set (lmbda 0), forward KL to every entry (beta 0). Tokens are random, as nothing depends on them.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        """Called by the trainer."""
        self.seconds.append(time.perf_counter())


def make_model(shape: dict[str, int], vocab_size: int, sequence_length: int) -> LlamaForCausalLM:
    """A model of that shape, float32, random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=sequence_length,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every token counts."""
    ids = torch.tensor([sample["input_ids"] for sample in samples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    vocab, length = asked["vocab_size"], asked["sequence_length"]
    tokens = torch.randint(vocab, (asked["steps"] * asked["batch_size"], length + 1))
    words = Tokenizer(models.WordLevel({str(index): index for index in range(vocab)}, unk_token="0"))
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=make_model(asked["student"], vocab, length + 1),
            teacher_model=make_model(asked["teacher"], vocab, length + 1),
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                max_steps=asked["steps"],
                per_device_train_batch_size=asked["batch_size"],
                max_grad_norm=1.0,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
            callbacks=[times],
        )
        trainer.train()
    print(json.dumps(times.seconds))


if __name__ == "__main__":
    main()
