"""The stages of this rank made real: one module with weights, gradient buffers, and gradient exchange."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from titan.config.model import ModelSettings
from titan.model.auxiliary import Auxiliary, auxiliary_specs
from titan.model.parameters import ParameterSpec, initial_value, parameter_specs
from titan.model.stage import Blocks, StageModel, gradient_buffer
from titan.parallel.bridge import TiedBridge, sum_over_islands
from titan.parallel.world import World

TIED = "embedding.weight"


@dataclass(frozen=True)
class ParallelStage:
    """The blocks of this rank, wrapped in megatron-core's buckets of gradients."""

    world: World
    module: StageModel
    wrapped: DistributedDataParallel | None
    """None for a stage that is not trained."""
    specs: dict[str, ParameterSpec]
    """Specs of the parameters that this stage holds, by global name."""
    tied: TiedBridge | None
    """None unless the model is tied and its ends are on different ranks."""

    @property
    def buckets(self) -> DistributedDataParallel:
        """Gradients, in megatron-core's buckets."""
        assert self.wrapped is not None, "a frozen stage has no gradients"
        return self.wrapped

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Local parameters by global name."""
        return dict(self.module.named_parameters())

    def is_copy(self, name: str) -> bool:
        """True for the last stage's copy of a tied embedding: it counts once, on the first stage."""
        return is_copy(self.world, name)

    def reduce_gradients(self) -> None:
        """Make every rank's gradients those of the whole batch: tied copies, sequence slices, replicas, islands.

        Sums, not means: the loss was divided by the global token count before.
        """
        parameters = self.named_parameters()
        if self.tied is not None:
            self.tied.collect_gradients(gradient_buffer(parameters[TIED]) if TIED in parameters else None)
        if self.module.config.sequence_parallel:
            norms = [gradient_buffer(p) for name, p in parameters.items() if self.specs[name].axis is None]
            if norms:
                flat = torch.cat([gradient.view(-1) for gradient in norms])
                dist.all_reduce(flat, group=self.world.groups.tp)
                for gradient, total in zip(norms, torch.split(flat, [g.numel() for g in norms]), strict=True):
                    gradient.copy_(total.view_as(gradient))
        if self.world.island_group.size() > 1:
            self.buckets.finish_grad_sync()
        sum_over_islands(self.world, [buffer.grad_data for buffer in self.buckets.buffers])

    def publish_weights(self) -> None:
        """After an update: what is held twice becomes equal again."""
        if self.tied is not None:
            self.tied.publish_weight()


def is_copy(world: World, name: str) -> bool:
    """Whether a parameter of this rank is a copy that the first stage owns."""
    return name == TIED and not world.place.stages[0].has_embedding


def build_stage(
    world: World, model: ModelSettings, vocab_size: int, dtype: torch.dtype, seed: int,
    auxiliary: Auxiliary | None = None, frozen: bool = False,
) -> ParallelStage:  # fmt: skip
    """Build this rank's blocks with their initial weights: the same numbers in every layout.

    frozen: without gradients, and without weights until some are loaded
    """
    place, layout = world.place, world.layout
    chunks = tuple(Blocks(s.first_layer, s.end_layer, s.has_embedding, s.has_head) for s in place.stages)
    module = StageModel(
        model, vocab_size, chunks, world.groups, dtype, layout.sequence_parallel, layout.recompute, auxiliary
    )
    module.to(world.platform.device)
    all_specs = parameter_specs(model, vocab_size) | auxiliary_specs(model, auxiliary or Auxiliary())
    specs = {}
    for name, parameter in module.named_parameters():
        spec = specs[name] = all_specs[name]
        if frozen:
            parameter.requires_grad_(False)
            continue
        whole = initial_value(name, spec, seed)
        part = spec.cut(whole, place.tensor, place.stage.tp)
        assert part.shape == parameter.shape, (
            f"{name}: {tuple(part.shape)} in the table, {tuple(parameter.shape)} built"
        )
        with torch.no_grad():
            parameter.copy_(part)
        # megatron-core's gradient norm asks these: is it a slice, or the same on every tensor rank? Does it count here?
        parameter.tensor_model_parallel = spec.axis is not None  # type: ignore[attr-defined]
        replicated = place.stage.shard == 1 and place.replica > 0
        parameter.shared = replicated or is_copy(world, name)  # type: ignore[attr-defined]
    if frozen:
        return ParallelStage(world, module, None, specs, None)
    buckets = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=place.stage.shard > 1),
        module,
        pg_collection=world.groups,
    )
    tied = None
    if model.tied and len(layout.positions) > 1:
        tied = TiedBridge(world, dict(module.named_parameters()).get(TIED))
    return ParallelStage(world, module, buckets, specs, tied)
