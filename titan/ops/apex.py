"""NVIDIA's apex, where it is really there: its fused norms, and the call that proves it."""

import importlib
from typing import Any

import torch


def probe(operation: str, device: str = "cuda") -> str | None:
    """Call apex's norm on a few numbers. Returns what is wrong, None if it gives what torch gives."""
    try:
        norm = _norm(operation)
        x = torch.linspace(-1, 1, 64, device=device).view(4, 16)
        weight = torch.ones(16, device=device)
        if operation == "rms_norm":
            got, expected = norm(x, weight, (16,), 1e-5), torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
        else:
            got = norm(x, weight, torch.zeros_like(weight), (16,), 1e-5)
            expected = torch.nn.functional.layer_norm(x, (16,), weight, None, 1e-5)
    except Exception as error:  # whatever a foreign or half-built package does, it is not to be used
        return f"NVIDIA's apex is not there or does not work ({str(error).partition(chr(10))[0]})"
    return None if torch.allclose(got, expected, atol=1e-4) else "apex gives other numbers than torch"


def norm(operation: str, *arguments: Any) -> torch.Tensor:
    """Call apex: rms_norm(x, weight, eps) or layer_norm(x, weight, bias, eps)."""
    *tensors, eps = arguments
    result: torch.Tensor = _norm(operation)(*tensors, tuple(tensors[1].shape), eps)
    return result


def _norm(operation: str) -> Any:
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    return module.fused_rms_norm_affine if operation == "rms_norm" else module.fused_layer_norm_affine
