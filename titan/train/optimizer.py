"""The optimizer of a rank: megatron-core's, with the state of each parameter open by its global name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from titan.config.model import OptimizerSettings
from titan.parallel.stage import ParallelStage

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """What the optimizer of this rank keeps of one parameter: elements [start, end) of the flattened local part."""

    name: str
    start: int
    end: int
    master: Tensor
    """float32 weights, flat; writing to it and calling `publish_masters` changes the model."""
    state: dict[str, Tensor]
    """`exp_avg`, `exp_avg_sq` (flat float32) and `step` (scalar)."""


class RoleOptimizer:
    """AdamW over the gradient buffers of a stage, with global clipping and, for fp16, a dynamic loss scale.

    Which of megatron-core's three optimizers does the work (fp32, mixed precision, sharded over replicas) follows from
    the dtype and the layout; `parameter_states` looks the same for all.
    """

    def __init__(self, stage: ParallelStage, settings: OptimizerSettings, dtype: torch.dtype):
        self.stage, self.settings, self.dtype = stage, settings, dtype
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            params_dtype=dtype,
            initial_loss_scale=2.0**16,
            use_distributed_optimizer=stage.world.place.stage.shard > 1,
        )
        chained = get_megatron_optimizer(
            config, [stage.buckets], use_gloo_process_groups=False, pg_collection=stage.world.groups
        )
        (self.inner,) = chained.chained_optimizers
        for group in self.inner.param_groups:
            # megatron-core only notes that norms have no decay; its learning-rate scheduler, not used here, applies it
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
            for parameter in group["params"]:
                self._fresh_state(parameter)

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        self.stage.buckets.zero_grad_buffer()
        self.inner.zero_grad()  # the fp32 optimizer lets .grad alias the buffer, and backward would add to both

    def step(self, learning_rate: float) -> float | None:
        """Clip and update. Returns the gradient's norm over the whole role, or None for a step that fp16 skipped."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        successful, norm, _ = self.inner.step()
        return float(norm) if successful else None

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass; 1 unless fp16."""
        return float(self.inner.get_loss_scale())

    def parameter_states(self) -> Iterator[ParameterState]:
        """State of every parameter this rank keeps a part of."""
        for name, parameter in self.stage.named_parameters().items():
            start, end = 0, parameter.numel()
            if isinstance(self.inner, DistributedOptimizer):
                if parameter not in self.inner.model_param_group_index_map:
                    continue
                own = self.inner._get_model_param_range_map(parameter)["param"]
                start, end = own.start, own.end
                group, position = self.inner.model_param_group_index_map[parameter]
                master = self.inner.optimizer.param_groups[group]["params"][position]
            else:
                master = getattr(parameter, "main_param", parameter)
            yield ParameterState(name, start, end, master, self.inner.optimizer.state[master])

    def publish_masters(self) -> None:
        """Round the master weights into the model, and give every replica the whole of them."""
        if self.dtype != torch.float32 or isinstance(self.inner, DistributedOptimizer):
            self.inner._copy_main_params_to_model_params()
        if isinstance(self.inner, DistributedOptimizer):
            self.stage.buckets.start_param_sync(force_sync=True)

    def scalar_state(self) -> dict[str, Any]:
        """What belongs to no parameter: the loss scale of fp16."""
        scaler = getattr(self.inner, "grad_scaler", None)
        if scaler is None:
            return {}
        return {key: float(value) for key, value in scaler.state_dict().items()}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        """Inverse of `scalar_state`."""
        scaler = getattr(self.inner, "grad_scaler", None)
        if scaler is not None and state:
            scaler._scale = torch.tensor([state["scale"]], dtype=torch.float32, device=self.stage.world.platform.device)
            scaler._growth_tracker = int(state["growth_tracker"])
            scaler._hysteresis_tracker = int(state["hysteresis_tracker"])

    def _fresh_state(self, parameter: Tensor) -> None:
        """Zero moments. Every parameter gets a `step` tensor of its own: shared ones count once a parameter."""
        self.inner.optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            **{moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS},
        }


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Learning rate of step `step`, counted from 1: linear warm-up to the peak, then the decay of the schedule."""
    warmup = min(settings.warmup_steps, total_steps)
    if step <= warmup:
        return settings.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    progress = min(1.0, progress)
    if settings.schedule == "constant":
        return settings.learning_rate
    shape = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_fraction + (1.0 - settings.final_fraction) * shape)
