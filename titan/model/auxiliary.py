"""What a student has only while it is distilled: one more layer, and the regressor of a hint. Neither is exported.

ERNIE 3.0 Titan (arXiv 2112.12731, section 5) puts an extra layer on each student and compares the attention of that
one: if it were the student's own last layer, the feed-forward network behind it would learn nothing from it.
Nothing is read from the extra layer but its queries, keys and values, so it is a norm and their projections.
"""

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from titan.config.model import ModelSettings
from titan.model.layer_spec import Attention, RMSNorm
from titan.model.parameters import INIT_STD, ParameterSpec, query_key_value_spec

PREFIX = "auxiliary."
"""Of the global names of these parameters."""


@dataclass(frozen=True)
class Auxiliary:
    """Which auxiliary blocks a student has; none by default."""

    layer: bool = False
    """An extra layer over the last, at index `model.layers`, on the stage with the head."""
    hint_layer: int | None = None
    """The layer whose hidden states are projected to the teacher's width, on the stage that holds it."""
    hint_width: int = 0
    """The teacher's width."""


class AuxiliaryLayer(nn.Module):
    """Norm and projections of one more attention."""

    def __init__(self, model: ModelSettings, config: TransformerConfig, groups: ProcessGroupCollection):
        super().__init__()
        self.input_layernorm = RMSNorm(config, model.hidden, model.norm_eps)
        projections = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=IdentityOp, linear_proj=IdentityOp
        )
        spec = ModuleSpec(Attention, {"attn_mask_type": AttnMaskType.causal}, projections)
        self.self_attention = build_module(spec, config=config, layer_number=model.layers + 1, pg_collection=groups)

    def forward(self, hidden: Tensor, rope_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as in Attention.heads, of the hidden states before the final norm."""
        normed, _ = self.input_layernorm(hidden, None)
        query, key, value = self.self_attention.heads(normed, rope_table)
        return query, key, value


def auxiliary_specs(model: ModelSettings, auxiliary: Auxiliary) -> dict[str, ParameterSpec]:
    """The auxiliary parameters by global name; exports and counts of parameters do not ask for them."""
    specs: dict[str, ParameterSpec] = {}
    if auxiliary.layer:
        specs[f"{PREFIX}layer.input_layernorm.weight"] = ParameterSpec((model.hidden,), (model.hidden,), None, None)
        specs[f"{PREFIX}layer.self_attention.linear_qkv.weight"] = query_key_value_spec(model, INIT_STD)
    if auxiliary.hint_layer is not None:
        shape = (auxiliary.hint_width, model.hidden)
        specs[f"{PREFIX}projection"] = ParameterSpec(
            shape, shape, None, model.hidden**-0.5
        )  # keeps the size of a state
    return specs
