"""One process of titan against a plain transformers loop of the same shape, on the same tokens, step by step in turn.

    python -m benchmarks.single_process [--rounds 40] [--threads 1]

Writes benchmarks/results/single_process.json. Bar: titan at least 0.95 of transformers' tokens a second.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.figures import ratio_interval, save_result
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings

SHAPES = {
    "small": ModelSettings(layers=4, hidden=96, heads=4, kv_heads=2, ffn=256),
    "medium": ModelSettings(layers=6, hidden=256, heads=8, kv_heads=4, ffn=704),
}
VOCAB_SIZE, SEQUENCE_LENGTH, BATCH_SIZE = 4096, 128, 16
WARM_UP_ROUNDS, ROUND_STEPS = 2, 2
Step = Callable[[np.ndarray], float]


def titan_step(model: ModelSettings) -> Step:
    """A titan trainer on one rank."""
    from titan.platform.device import prepare_process, select_platform

    platform = select_platform("cpu")
    prepare_process(platform)
    from torch._C._distributed_c10d import FileStore

    from titan.ops.objective import Objective
    from titan.parallel.world import join_world
    from titan.plan.layout import make_layout
    from titan.train.trainer import Trainer, TrainerSettings

    store = FileStore(tempfile.mktemp(), 1)
    layout = LayoutSettings()
    world = join_world("teacher", make_layout(model, layout), 0, platform, store, 60.0)
    settings = TrainerSettings(
        model, layout, OptimizerSettings(), "fp32", VOCAB_SIZE, SEQUENCE_LENGTH, BATCH_SIZE, seed=1
    )
    trainer = Trainer(world, settings)
    return lambda tokens: trainer.step(tokens, 1e-3, Objective()).cross_entropy


def transformers_step(model: ModelSettings) -> Step:
    """What a user of transformers would write: LlamaForCausalLM with its own loss, AdamW, clipping."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=SEQUENCE_LENGTH,
        use_cache=False,
    )
    llama = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64))
        loss = llama(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="medium")
    options = parser.parse_args()
    model = SHAPES[options.shape]
    contenders = {"titan": titan_step(model), "transformers": transformers_step(model)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(0)
    times: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for turn in range(options.rounds + WARM_UP_ROUNDS):
        batches = [generator.integers(0, VOCAB_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1)) for _ in range(ROUND_STEPS)]
        for name, step in contenders.items():
            seconds = []
            for batch in batches:
                begin = time.perf_counter()
                step(batch)
                seconds.append(time.perf_counter() - begin)
            if turn >= WARM_UP_ROUNDS:
                times[name].append(seconds)
    dist.destroy_process_group()
    speed, low, high = ratio_interval(times["transformers"], times["titan"])
    tokens = BATCH_SIZE * SEQUENCE_LENGTH
    medians = {name: sorted(t for r in rounds for t in r)[options.rounds] for name, rounds in times.items()}
    for name, median in medians.items():
        print(f"{name:14} {median * 1000:7.1f} ms a step, {tokens / median:8.0f} tokens/s")
    print(f"titan / transformers, tokens a second: {speed:.3f} (95 % interval {low:.3f} to {high:.3f}); bar 0.95")
    save_result(
        f"single_process_{options.shape}",
        {
            "speed_ratio": speed,
            "interval_95": [low, high],
            "bar": 0.95,
            "shape": model.model_dump(),
            "threads": options.threads,
            "median_step_s": medians,
        },
    )


if __name__ == "__main__":
    main()
