"""titan's CPU kernels against eager torch, torch.compile and Liger-Kernel, in turn in one process.

    python -m benchmarks.kernels [norm swiglu rope loss memory labels attention]   (all without a name)

Writes benchmarks/results/kernels.json and prints a table. Ratios are medians over rounds of contender / titan, with a
95 % bootstrap interval; above 1 titan is faster. The ceilings are this machine's own, in the same run.

Freed memory is kept for all contenders alike, but for the loss it is measured both ways: there the allocations that
titan does without are what others pay for, in a process that leaves the C library as it is.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.figures import ratio_interval, save_result
from titan.ops.head import run_head
from titan.ops.label import SparseLabels, TailDraws
from titan.ops.look import VocabShard
from titan.ops.norm import residual_layer_norm, residual_rms_norm
from titan.ops.objective import Objective
from titan.ops.rope import rope, rope_twin
from titan.ops.says import label_logits
from titan.ops.swiglu import swiglu, swiglu_twin

ROUNDS, LOSS_ROUNDS, WARM_UP = 21, 7, 2
THREADS = 2
TOKENS, WIDTH = 4096, 1024
HEAD, TAIL = 32, 4
Contenders = dict[str, Callable[[], object]]


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for all contenders alike.

    It returns large blocks to the system by a threshold that moves with what was freed before, so that one contender
    may pay 6000 page faults a call (8 ms at 4096 x 1024) for outputs that another one gets from memory at hand.
    """
    trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, largest)):
        raise SystemExit("the C library refuses mallopt: times would depend on its luck with page faults")


def timed(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one call a round in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + WARM_UP):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - begin)
    return times


def compare(contenders: Contenders, rounds: int, bars: dict[str, float] | None = None) -> dict[str, Any]:
    """Medians, and how many times faster titan is than each other contender."""
    times = timed(contenders, rounds)
    result: dict[str, Any] = {"median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()}}
    result["speedup"] = {}
    for name in contenders:
        if name != "titan":
            point, low, high = ratio_interval([[t] for t in times[name]], [[t] for t in times["titan"]])
            result["speedup"][name] = {"ratio": point, "interval_95": [low, high], "bar": (bars or {}).get(name)}
    return result


def ceilings() -> dict[str, float]:
    """What the machine gives at best: matrix products, and copies of 64 MB."""
    a, source = torch.randn(1024, 1024), torch.randn(16 << 20)
    target = torch.empty_like(source)
    times = timed({"mm": lambda: a @ a, "copy": lambda: target.copy_(source)}, 15)
    return {
        "matmul_gflops": 2 * 1024**3 / min(times["mm"]) / 1e9,
        "copy_gb_s": 2 * source.numel() * 4 / min(times["copy"]) / 1e9,
    }


def both_ways(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward with fixed gradients."""
    grads = [torch.randn_like(out) for out in function(*inputs)]
    return lambda: torch.autograd.grad(function(*inputs), inputs, grads)


def norms() -> dict[str, Any]:
    """Residual and norm, forward and backward, 4096 x 1024."""
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
        weight = torch.ones(WIDTH, dtype=dtype, requires_grad=True)
        bias = torch.zeros(WIDTH, dtype=dtype, requires_grad=True)

        def rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            hidden = x + residual
            return F.rms_norm(hidden, (WIDTH,), weight, 1e-6), hidden

        def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            hidden = x + residual
            return F.layer_norm(hidden, (WIDTH,), weight, bias, 1e-5), hidden

        of_rms: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "eager": rms,
            "compile": torch.compile(rms),
            "titan": lambda x, r, w: residual_rms_norm(x, r, w, 1e-6),
        }
        of_layer: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "eager": layer,
            "compile": torch.compile(layer),
            "titan": lambda x, r, w, b: residual_layer_norm(x, r, w, b, 1e-5),
        }
        name = str(dtype).removeprefix("torch.")
        bars = {"eager": 3.0, "compile": 1.3} if dtype == torch.float32 else {"compile": 1.0}
        calls = {who: both_ways(f, (x, residual, weight)) for who, f in of_rms.items()}
        results[f"residual + RMSNorm {name}"] = compare(calls, ROUNDS, bars)
        calls = {who: both_ways(f, (x, residual, weight, bias)) for who, f in of_layer.items()}
        results[f"residual + LayerNorm {name}"] = compare(calls, ROUNDS, {"eager": 1.0, "compile": 1.0})
    return results


def activations() -> dict[str, Any]:
    """SwiGLU, forward and backward, 2048 x 2 x 2816."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 2 * 2816, dtype=dtype, requires_grad=True)
        calls = {
            "eager": both_ways(as_tuple(swiglu_twin), (x,)),
            "compile": both_ways(as_tuple(torch.compile(swiglu_twin)), (x,)),
            "titan": both_ways(as_tuple(swiglu), (x,)),
        }
        results[f"SwiGLU {str(dtype).removeprefix('torch.')}"] = compare(calls, ROUNDS)
    return results


def as_tuple(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of one output as one of several."""
    return lambda *inputs: (function(*inputs),)


def rotary() -> dict[str, Any]:
    """RoPE of a query cut from a fused projection, forward and backward: sequence 1024, batch 4, 16 heads of 64."""
    results = {}
    angles = torch.outer(torch.arange(1024.0), 10000.0 ** (-torch.arange(0, 64, 2) / 64))
    table = torch.stack([angles.cos(), angles.sin()])

    def of_query(turn: Callable[[Tensor, Tensor], Tensor], fused: Tensor) -> Tensor:
        return turn(fused.view(1024, 4, 16, 192)[..., :64], table)

    for dtype in (torch.float32, torch.bfloat16):
        fused = torch.randn(1024, 4, 3 * 16 * 64, dtype=dtype, requires_grad=True)
        calls = {
            "eager": both_ways(as_tuple(partial(of_query, rope_twin)), (fused,)),
            "compile": both_ways(as_tuple(torch.compile(partial(of_query, rope_twin))), (fused,)),
            "titan": both_ways(as_tuple(partial(of_query, rope)), (fused,)),
        }
        results[f"RoPE {str(dtype).removeprefix('torch.')}"] = compare(calls, ROUNDS)
    return results


def loss_problem(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weight, targets, label ids and probabilities of HEAD entries."""
    hidden = torch.randn(tokens, WIDTH)
    weight = torch.randn(vocabulary, WIDTH) * 0.02
    targets = torch.randint(0, vocabulary, (tokens,))
    ids = (torch.randint(0, vocabulary, (tokens, 1)) + torch.arange(HEAD) * 997) % vocabulary
    probability = torch.rand(tokens, HEAD)
    return hidden, weight, targets, ids, probability / probability.sum(1, keepdim=True)


def gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Both gradients by autograd."""
    return torch.autograd.grad(loss(hidden, weight, *rest), (hidden, weight))


def full_kl(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """All of the teacher's logits, [tokens, vocabulary], as usually written."""
    logits = hidden @ weight.t()
    soft = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    loss = 0.5 * soft + 0.5 * F.cross_entropy(logits, targets)
    return torch.autograd.grad(loss, (hidden, weight))


def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What no loss with both gradients can do without: three matrix products."""
    logits = hidden @ weight.t()
    return logits @ weight, logits.t() @ hidden


def titan_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, probability: Tensor) -> tuple[Tensor, ...]:
    """The same loss and both gradients from titan.ops.head."""
    tokens, vocabulary = len(hidden), len(weight)
    grad_weight = torch.zeros_like(weight)
    result = run_head(
        hidden, weight, targets, torch.ones(tokens), VocabShard(0, vocabulary, vocabulary, None),
        objective=Objective(0.5), labels=SparseLabels(ids, probability.log(), "none"), grad_weight_VD=grad_weight,
        grad_scale=1 / tokens,
    )  # fmt: skip
    assert result.grad_hidden_ND is not None
    return result.grad_hidden_ND, grad_weight


def losses(memory: str = "memory kept") -> dict[str, Any]:
    """Sparse-label loss with both gradients, 512 tokens, width 1024."""
    results = {}
    for vocabulary in (32000, 152000):
        hidden, weight, targets, ids, probability = loss_problem(512, vocabulary)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        teacher = torch.randn(512, vocabulary) * 3
        detached = (hidden.detach(), weight.detach())
        calls: Contenders = {
            "naive sparse": partial(gradients, naive_sparse_loss, hidden, weight, targets, ids, probability),
            "full KL": partial(full_kl, hidden, weight, targets, teacher),
            "3 products alone": partial(products, *detached),
            "titan": partial(titan_loss, *detached, targets, ids, probability),
        }
        if vocabulary == 32000:
            compiled = torch.compile(naive_sparse_loss)
            calls["compile"] = partial(gradients, compiled, hidden, weight, targets, ids, probability)
        bars = {"naive sparse": 1 / 1.05, "full KL": 1.5}
        results[f"loss, V {vocabulary}, {memory}"] = compare(calls, LOSS_ROUNDS, bars)
    return results


def naive_sparse_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, probability: Tensor) -> Tensor:
    """Sparse labels as usually written: whole logits, log_softmax, gather."""
    log_q = torch.log_softmax(hidden @ weight.t(), dim=1)
    soft = (probability * (probability.log() - log_q.gather(1, ids))).sum(1)
    return (0.5 * soft + 0.5 * F.nll_loss(log_q, targets, reduction="none")).mean()


def memory() -> dict[str, Any]:
    """Peak memory beyond inputs and the weight's gradient, 4096 tokens, each in a process of its own."""
    results: dict[str, Any] = {}
    for vocabulary in (32000, 152000):
        peaks = {
            name: float(
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.kernels", "--peak", name, str(vocabulary)],
                    capture_output=True, text=True, check=True,
                ).stdout.split()[-1]
            )
            for name in ("naive", "titan")
        }  # fmt: skip
        share = peaks["titan"] / peaks["naive"]
        results[f"memory of the loss, V {vocabulary}"] = {"peak_mib": peaks, "share": share, "bar": 1 / 20}
    return results


def peak_mib(name: str, vocabulary: int) -> float:
    """What one evaluation adds to the process's peak, without the weight's gradient."""
    call = partial(gradients, naive_sparse_loss) if name == "naive" else titan_loss

    def prepared(tokens: int, size: int) -> list[Tensor]:
        hidden, weight, *rest = loss_problem(tokens, size)
        if name == "naive":
            hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        return [hidden, weight, *rest]

    call(*prepared(64, 1000))  # libraries loaded, threads started
    arguments = prepared(TOKENS, vocabulary)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_mib("VmRSS")
    call(*arguments)
    return _status_mib("VmHWM") - before - vocabulary * WIDTH * 4 / 2**20


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def label_encoding() -> dict[str, Any]:
    """Log-sum-exp, entropy, top k and draws of the tail, from 256 tokens of logits: few, and as many as runs want."""
    results = {}
    for (top_k, count), vocabulary in product(((8, TAIL), (15, 49)), (32000, 152000)):
        logits = torch.randn(256, vocabulary) * 3
        draws = TailDraws(count, 1, torch.arange(256), torch.zeros(256, dtype=torch.int64))
        shard = VocabShard(0, vocabulary, vocabulary, None)

        calls: Contenders = {
            "eager": partial(eager_labels, logits, top_k, count),
            "compile": partial(torch.compile(eager_labels), logits, top_k, count),
            "titan": partial(label_logits, logits, top_k, draws, 1.0, shard),
        }
        results[f"label encoding, top {top_k}, {count} draws, V {vocabulary}"] = compare(calls, 15, {"eager": 3.0})
    return results


def eager_labels(logits: Tensor, top_k: int, draws: int) -> object:
    """The same label from torch's own operations; its draws are of the whole distribution."""
    log_p = torch.log_softmax(logits, dim=1)
    return log_p.topk(top_k, dim=1), torch.multinomial(log_p.exp(), draws, replacement=True)


def attention_ceiling() -> dict[str, Any]:
    """The attention of torch, which titan uses on the CPU, against the matrix product: sequence 1024, 8 heads of 64."""
    query, key, value = (torch.randn(2, 8, 1024, 64, requires_grad=True) for _ in range(3))
    a, grad = torch.randn(1024, 1024), torch.randn(2, 8, 1024, 64)

    def both() -> object:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.autograd.grad(out, (query, key, value), grad)

    times = timed({"mm": lambda: a @ a, "attention": both}, 7)
    done = 3.5 * 2 * 2 * 8 * 1024 * 1024 * 64 / statistics.median(times["attention"]) / 1e9
    ceiling = 2 * 1024**3 / statistics.median(times["mm"]) / 1e9
    return {"attention float32, forward and backward": {"gflops": done, "share_of_matmul": done / ceiling}}


def liger() -> str:
    """Whether Liger-Kernel has a CPU path, by trying it: its kernels are written in Triton."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        LigerRMSNormFunction.apply(torch.randn(4, 8, requires_grad=True), torch.ones(8), 1e-6)
    except Exception as error:  # a missing package, a missing triton driver: whatever keeps it from running
        return f"not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "runs on the CPU; to be measured"


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "norm": norms, "swiglu": activations, "rope": rotary, "loss": losses, "memory": memory, "labels": label_encoding,
    "attention": attention_ceiling,
}  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """The table."""
    table = Table(box=None, pad_edge=False)
    for title in ("operation", "titan ms", "against", "times faster", "95 % interval", "bar"):
        table.add_column(title)
    for operation, result in results.items():
        if "speedup" in result:
            for name, found in result["speedup"].items():
                low, high = found["interval_95"]
                bar = (
                    ""
                    if found["bar"] is None
                    else f"{found['bar']:.2f} {'met' if found['ratio'] >= found['bar'] else 'NOT MET'}"
                )
                titan_ms = f"{result['median_ms']['titan']:.2f}"
                table.add_row(operation, titan_ms, name, f"{found['ratio']:.2f}", f"{low:.2f} to {high:.2f}", bar)
        elif "share" in result:
            peaks, met = result["peak_mib"], result["share"] <= result["bar"]
            text = f"1/{1 / result['share']:.0f} of {peaks['naive']:.0f} MiB"
            table.add_row(operation, "", "naive", text, "", f"1/20 {'met' if met else 'NOT MET'}")
        else:
            table.add_row(operation, "", "matmul", f"{result['share_of_matmul']:.2f} of its GFLOP/s", "", "")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "V"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if options.peak:
        print(peak_mib(options.peak[0], int(options.peak[1])))
        return
    results: dict[str, Any] = {}
    if "loss" in (options.parts or PARTS):
        results |= losses("as it comes")
    keep_freed_memory()
    machine = ceilings()
    print(f"ceilings: matmul {machine['matmul_gflops']:.1f} GFLOP/s, copy {machine['copy_gb_s']:.1f} GB/s")
    print(f"Liger-Kernel: {(other := liger())}")
    for part in options.parts or PARTS:
        results |= PARTS[part]()
    show(results)
    if not options.parts:
        save_result("kernels", {"threads": THREADS, "ceilings": machine, "liger": other, "operations": results})


if __name__ == "__main__":
    main()
