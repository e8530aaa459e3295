"""A stage made real on this rank: its module with weights, gradient buffers, and gradient exchange."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from titan.config.settings import ModelSettings
from titan.model.parameters import ParameterSpec, initial_value, parameter_specs
from titan.model.stage import Blocks, StageModel, gradient_buffer
from titan.parallel.world import World


@dataclass(frozen=True)
class ParallelStage:
    """The blocks of this rank, wrapped in megatron-core's buckets of gradients."""

    world: World
    module: StageModel
    buckets: DistributedDataParallel
    specs: dict[str, ParameterSpec]
    """Specs of the parameters that this stage holds, by global name."""

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Local parameters by global name."""
        return dict(self.module.named_parameters())

    def is_copy(self, name: str) -> bool:
        """True for the last stage's copy of a tied embedding: it counts once, on the first stage."""
        return name == "embedding.weight" and not self.world.place.stage.has_embedding

    def reduce_gradients(self) -> None:
        """Make every rank's gradients those of the whole batch: tied copies, sequence slices, then replicas.

        Sums, not means: the loss was divided by the global token count before.
        """
        place = self.world.place
        parameters = self.named_parameters()
        if self.world.tied_group is not None:
            dist.all_reduce(gradient_buffer(parameters["embedding.weight"]), group=self.world.tied_group)
        if self.module.config.sequence_parallel:
            norms = [gradient_buffer(p) for name, p in parameters.items() if self.specs[name].axis is None]
            if norms:
                flat = torch.cat([gradient.view(-1) for gradient in norms])
                dist.all_reduce(flat, group=self.world.groups.tp)
                for gradient, total in zip(norms, torch.split(flat, [g.numel() for g in norms]), strict=True):
                    gradient.copy_(total.view_as(gradient))
        if place.stage.dp > 1:
            self.buckets.finish_grad_sync()


def build_stage(world: World, model: ModelSettings, vocab_size: int, dtype: torch.dtype, seed: int) -> ParallelStage:
    """Build this rank's blocks with their initial weights: the same numbers in every layout."""
    place, layout = world.place, world.layout
    stage = place.stage
    blocks = Blocks(stage.first_layer, stage.end_layer, stage.has_embedding, stage.has_head)
    module = StageModel(model, vocab_size, blocks, world.groups, dtype, layout.sequence_parallel, layout.recompute)
    module.to(world.platform.device)
    all_specs = parameter_specs(model, vocab_size)
    specs = {}
    for name, parameter in module.named_parameters():
        spec = specs[name] = all_specs[name]
        whole = initial_value(name, spec, seed)
        part = spec.cut(whole, place.tensor, place.stage.tp)
        assert part.shape == parameter.shape, (
            f"{name}: {tuple(part.shape)} in the table, {tuple(parameter.shape)} built"
        )
        with torch.no_grad():
            parameter.copy_(part)
        # megatron-core's gradient norm asks these: is it a slice, or the same on every tensor rank?
        parameter.tensor_model_parallel = spec.axis is not None  # type: ignore[attr-defined]
        parameter.shared = name == "embedding.weight" and not place.stage.has_embedding  # type: ignore[attr-defined]
    buckets = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=place.stage.shard > 1),
        module,
        pg_collection=world.groups,
    )
    return ParallelStage(world, module, buckets, specs)
