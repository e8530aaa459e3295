"""Counts the bytes of living tensors on a CPU, where no allocator does: for checking what a plan says of memory."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Inside `with`, knows every storage that an operation makes, and when it goes. Slow: for measuring only."""

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        """apart: tensors made before that are not to be counted when an operation returns a view of them"""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in apart}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or not storage.nbytes():
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor):
                self.add(item)
        return out


@contextlib.contextmanager
def kept_for_backward(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Bytes that a forward pass inside `with` keeps for its backward pass, without parameters: the list's one entry."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    seen: set[int] = set()
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen.add(storage._cdata)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
