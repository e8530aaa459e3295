"""How large labels are on the wire, and how fast they are written and read.

    python -m benchmarks.codec [--rounds 15]

Blocks of 8 samples of 128 tokens, as a teacher says them of Zipf distributions (exponent 1.2 with a standard deviation
of 0.3 from token to token), by one core. Codecs take turns; medians and quartiles of the rounds. Megabytes are those
of the encoded block. Writes benchmarks/results/codec.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.figures import save_result
from titan.config.distillation import LabelSettings
from titan.distill.codec.bits import packed_bytes, width_of
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.tap import label_wish, raw_labels
from titan.ops.label import TailDraws
from titan.ops.look import VocabShard
from titan.ops.says import label_logits
from titan.train.trainer import LabelPart

SAMPLES, LENGTH, WIDTH = 8, 128, 1024
VOCABULARIES = (32_000, 151_936)
RS_DRAWS = {32_000: 19, 151_936: 17}
"""As many as 36 bytes hold."""
CODECS = {
    "sampled": LabelSettings(),
    "top_k": LabelSettings(codec="top_k"),
    "random": LabelSettings(codec="random"),
    "hidden": LabelSettings(codec="hidden"),
    "full": LabelSettings(codec="full"),
}


def teacher_says(vocab: int, settings: LabelSettings) -> LabelBlock:
    """A block before encoding."""
    rng = np.random.default_rng(0)
    ids_B, tokens = np.arange(SAMPLES, dtype=np.int64), SAMPLES * LENGTH
    texts = rng.integers(0, vocab, (SAMPLES, LENGTH + 1)).astype(np.int32)
    if settings.codec == "hidden":  # the output weight comes once a step
        hidden = rng.standard_normal((SAMPLES, LENGTH, WIDTH)).astype(np.float32)
        return LabelBlock(1, 0, ids_B, texts, RawLabels("hidden", hidden_BSD=hidden, weight_version=1))
    exponent_N1 = 1.2 + 0.3 * torch.from_numpy(rng.standard_normal((tokens, 1)).astype(np.float32))
    logits_NV = -exponent_N1 * torch.arange(1, vocab + 1).log()
    for row in logits_NV:
        row.copy_(row[torch.from_numpy(rng.permutation(vocab))])
    wish = label_wish(settings, 1, 1)
    rows = torch.arange(tokens)
    draws = None
    if wish.draws:
        draws = TailDraws(wish.draws, wish.seed, rows % SAMPLES, rows // SAMPLES, wish.independent)
    says = label_logits(logits_NV, wish.top_k, draws, 1.0, VocabShard(0, vocab, vocab, None), wish.whole)
    return LabelBlock(1, 0, ids_B, texts, raw_labels(settings, LabelPart(0, SAMPLES, says), LENGTH))


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(vocab: int, rounds: int) -> dict[str, Any]:
    """Every codec at a vocabulary."""
    blocks, coded, times = {}, {}, {name: ([], []) for name in CODECS}  # type: ignore[var-annotated]
    for name, settings in CODECS.items():
        if name == "random":
            settings = settings.model_copy(update={"draws": RS_DRAWS[vocab]})
        block = teacher_says(vocab, settings)
        blocks[name] = (block, settings.bytes_per_token)
        coded[name] = encode_block(block, vocab, settings.bytes_per_token)
    for number in range(rounds + 1):
        for name, (block, budget) in blocks.items():
            data = coded[name]
            header = BlockHeader.unpack(data[:HEADER_BYTES])
            took = (
                seconds(lambda block=block, budget=budget: encode_block(block, vocab, budget)),  # type: ignore[misc]
                seconds(lambda header=header, data=data: decode_block(header, data[HEADER_BYTES:])),  # type: ignore[misc]
            )
            if number:  # the first is warm-up
                for kept, one in zip(times[name], took, strict=True):
                    kept.append(one)
    tokens = SAMPLES * LENGTH
    ids = packed_bytes(SAMPLES * (LENGTH + 1), width_of(vocab)) + 8 * SAMPLES + HEADER_BYTES
    return {
        name: {
            "label_bytes_per_token": (len(data) - ids) / tokens,
            "block_bytes_per_token": len(data) / tokens,
            **{
                f"{what}_mb_s": [len(data) / 1e6 / x for x in reversed(statistics.quantiles(some, n=4))]
                for what, some in zip(("encode", "decode"), times[name], strict=True)
            },
            "encode_tokens_s": tokens / statistics.median(times[name][0]),
        }
        for name, data in coded.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {f"V {vocab:,}": measure(vocab, options.rounds) for vocab in VOCABULARIES}
    for vocab, rows in result.items():
        print(f"{vocab}: bytes a token of labels, and with ids; MB/s (quartiles), tokens/s written")
        for name, row in rows.items():
            shown = [" ".join(f"{x:7.1f}" for x in row[key]) for key in ("encode_mb_s", "decode_mb_s")]
            print(
                f"  {name:8} {row['label_bytes_per_token']:9.1f} {row['block_bytes_per_token']:9.1f}   write {shown[0]}"
                f"   read {shown[1]}   {row['encode_tokens_s']:9,.0f}"
            )
    save_result("codec", result)


if __name__ == "__main__":
    main()
