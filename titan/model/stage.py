"""The part of a model that one stage holds: named blocks, numbers in, hidden states out."""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import build_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titan.config.model import ModelSettings
from titan.model.auxiliary import Auxiliary, AuxiliaryLayer
from titan.model.capture import HEADS, NOTHING, Capture, Features, named_features
from titan.model.layer_spec import RMSNorm, layer_spec, transformer_config
from titan.model.parameters import padded_vocab
from titan.ops.attention import Visibility


def gradient_buffer(parameter: nn.Parameter) -> Tensor:
    """The float32 slice of megatron-core's gradient buffer that belongs to a parameter."""
    buffer: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return buffer


@dataclass(frozen=True)
class Blocks:
    """Which blocks of a model: maybe the embedding, layers [first_layer, end_layer), maybe final norm and head."""

    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool


class StageModel(nn.Module):
    """Blocks `embedding`, `layers.N`, `final_norm` and `head` of a decoder; parameter names are global names.

    A rank may hold several chunks of the model, far from each other; each is run on its own.

    The head is only a weight here: losses, gradients and labels are made from hidden states by one chunked operation
    outside the forward pass. With a tied model the last stage holds a copy of the embedding instead.
    """

    def __init__(
        self,
        model: ModelSettings,
        vocab_size: int,
        chunks: tuple[Blocks, ...],
        groups: ProcessGroupCollection,
        dtype: torch.dtype,
        sequence_parallel: bool,
        recompute: bool,
        auxiliary: Auxiliary | None = None,
    ):
        """auxiliary: what a student has only while it is distilled"""
        super().__init__()
        tp = groups.tp.size()
        self.config = transformer_config(model, dtype, tp, sequence_parallel)
        self.model, self.chunks, self.recompute = model, chunks, recompute
        has_head = chunks[-1].has_head
        rows = padded_vocab(vocab_size)
        if chunks[0].has_embedding or (has_head and model.tied):
            self.embedding = VocabParallelEmbedding(
                rows,
                model.hidden,
                init_method=torch.nn.init.zeros_,
                reduce_scatter_embeddings=self.config.sequence_parallel,
                config=self.config,
                tp_group=groups.tp,
            )
        spec = layer_spec(groups.tp)
        self.layers = nn.ModuleDict(
            {
                str(index): build_module(spec, config=self.config, layer_number=index + 1, pg_collection=groups)
                for blocks in chunks
                for index in range(blocks.first_layer, blocks.end_layer)
            }
        )
        if has_head:
            self.final_norm = RMSNorm(self.config, model.hidden, model.norm_eps)
            if not model.tied:
                self.head = nn.Parameter(torch.empty(rows // tp, model.hidden, dtype=dtype))
        self.auxiliary = self._auxiliary(auxiliary or Auxiliary(), groups, dtype)

    @property
    def output_weight(self) -> nn.Parameter:
        """[padded vocabulary / tp, hidden]; only on the stage with the head."""
        weight: nn.Parameter = self.embedding.weight if self.model.tied else self.head
        return weight

    @property
    def projection(self) -> nn.Parameter | None:
        """[teacher's width, hidden] of a hint; None on a stage without it."""
        projection: nn.Parameter | None = getattr(self.auxiliary, "projection", None)
        return projection

    def forward(self, inputs: dict[str, Tensor], chunk: int = 0, capture: Capture | None = None) -> dict[str, Tensor]:
        """One micro-batch through the blocks of a chunk.

        inputs:  `rope` from rope_table; the first stage `tokens` [B, S] int64, a later one `hidden` [S, B, hidden]
                 ([S / tp, B, hidden] with sequence parallelism); maybe `segments` [B, S] int32: a token sees its own
        capture: features of one layer to lay beside it, if this chunk has the layer (titan.model.capture)
        returns: `hidden` of the same shape, after the final norm on the last stage
        """
        blocks = self.chunks[chunk]
        hidden = self._embed(inputs["tokens"]) if blocks.has_embedding else inputs["hidden"]
        segments = inputs.get("segments")
        visibility = Visibility(causal=True, query_segments=segments, key_segments=segments)
        branch: Tensor | None = None
        features: Features = {}
        for index in range(blocks.first_layer, blocks.end_layer):
            asked = capture.names_of(index) if capture is not None else NOTHING
            with_heads = not asked.isdisjoint(HEADS)
            run = partial(
                self.layers[str(index)], rope_table=inputs["rope"], visibility=visibility, with_heads=with_heads
            )
            if self.recompute and torch.is_grad_enabled():
                hidden, branch, *heads = checkpoint(run, hidden, branch, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, branch, *heads = run(hidden, branch)
            features.update(zip(HEADS, heads, strict=False))
            if "hidden" in asked:
                features["hidden"] = hidden + branch
        if blocks.has_head:
            hidden, total = self.final_norm(hidden, branch)
            if capture is not None and capture.names_of(self.model.layers):
                extra: nn.Module = self.auxiliary.layer  # type: ignore[assignment]
                features.update(zip(HEADS, extra(total, inputs["rope"]), strict=True))
        elif branch is not None:
            hidden = hidden + branch
        return {"hidden": hidden} if capture is None else {"hidden": hidden, **named_features(features, capture)}

    def _auxiliary(self, auxiliary: Auxiliary, groups: ProcessGroupCollection, dtype: torch.dtype) -> nn.Module:
        """Those auxiliary blocks that belong to this stage."""
        blocks = nn.Module()
        if auxiliary.layer and self.chunks[-1].has_head:
            blocks.layer = AuxiliaryLayer(self.model, self.config, groups)
        hinted = auxiliary.hint_layer
        if hinted is not None and any(chunk.first_layer <= hinted < chunk.end_layer for chunk in self.chunks):
            blocks.projection = nn.Parameter(torch.empty(auxiliary.hint_width, self.model.hidden, dtype=dtype))
        return blocks

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens_BS)
        if self.config.sequence_parallel:
            return embedded  # already [S / tp, B, hidden]
        return embedded.transpose(0, 1).contiguous()


def rope_table(model: ModelSettings, sequence_length: int, device: torch.device) -> Tensor:
    """Cosine and sine of the rotary angles (arXiv 2104.09864), in Llama's half-split order: [2, S, D / 2] float32."""
    width = model.hidden // model.heads
    frequencies = model.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.outer(torch.arange(sequence_length, dtype=torch.float32, device=device), frequencies)
    return torch.stack([angles.cos(), angles.sin()])
