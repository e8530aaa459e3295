"""Lets megatron-core 0.16.1, which takes a CUDA device for granted, run on CPU with gloo.

`install()` replaces the few names of torch.cuda and torch that megatron-core calls without asking, in this process
only. Each block says what needs it. Checked by tests/test_megatron_traps.py and every parallel test.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


def install() -> None:
    """Adapt torch and megatron-core to CPU; a second call and a process with CUDA are left alone."""
    if torch.cuda.is_available() or getattr(torch.cuda, "titan_adapted", False):
        return
    torch.cuda.titan_adapted = True  # type: ignore[attr-defined]
    _import_megatron_without_compiling()
    _answer_device_questions()
    _take_random_state_from_cpu()
    _build_tensors_on_cpu()


def _import_megatron_without_compiling() -> None:
    """megatron-core decorates small functions with torch.compile on import: on CPU that costs seconds for no gain."""
    compile_function = torch.compile

    def leave_as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else (lambda inner: inner)

    torch.compile = leave_as_it_is  # type: ignore[assignment]
    try:
        import megatron.core.optimizer
        import megatron.core.tensor_parallel
        import megatron.core.transformer.transformer_layer  # noqa: F401
    finally:
        torch.compile = compile_function


class _NoStream:
    """Stands in for a CUDA stream or event: on CPU all work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _answer_device_questions() -> None:
    """Device identity, synchronisation and streams, asked for by optimizer, buffers and random-state code."""
    cuda: Any = torch.cuda

    def nothing() -> Callable[..., None]:
        return lambda *_, **__: None  # distinct objects: torch.compile refuses aliases of torch functions

    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, nothing())
    cuda.Stream, cuda.Event = _NoStream, _NoStream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_stream = lambda *_, **__: _NoStream()
    cuda.default_stream = lambda *_, **__: _NoStream()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = nothing(), nothing()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self
    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizers sort parameters by the strings torch.cuda.FloatTensor, HalfTensor and BFloat16Tensor."""
        answer = plain_type(self, *args, **kwargs)
        if isinstance(answer, str) and ".cuda." not in answer:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor.type = type_as_on_cuda


def _take_random_state_from_cpu() -> None:
    """megatron-core keeps one CUDA generator state a tensor rank; nothing here draws on it, but building asks."""
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda device="cuda": torch.default_generator.get_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.default_generator.set_state(state)
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: cuda.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: cuda.get_rng_state()


def _build_tensors_on_cpu() -> None:
    """megatron-core writes device="cuda" into tensor factories."""
    # `with torch.device(...)` keeps a set of the factories from its first use on: it must be of the true ones
    _device._device_constructors()

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
                kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return build

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
