"""megatron-core's transformer layer with our operations plugged in: norms with their residual, rotary embedding,
attention and SwiGLU. What it computes between its projections is all titan.ops.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan.config.model import ModelSettings
from titan.ops.attention import Visibility, attention
from titan.ops.norm import residual_rms_norm, rms_norm
from titan.ops.rope import rope
from titan.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """RMSNorm that also works on a slice of the sequence; megatron-core's own asserts that away on CPU."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, hidden: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm of hidden + branch, and that sum; both [..., hidden_size]. Without a branch the sum is hidden."""
        if branch is None:
            return rms_norm(hidden, self.weight, self.eps), hidden
        return residual_rms_norm(branch, hidden, self.weight, self.eps)


class Attention(SelfAttention):
    """megatron-core's projections around our rotary embedding and attention."""

    def forward(
        self, normed: Tensor, rope_table: Tensor, visibility: Visibility, with_heads: bool = False
    ) -> tuple[Tensor, ...]:
        """normed: [S, B, hidden]; rope_table: as titan.model.stage.rope_table makes it.

        returns: [S, B, hidden]; if asked also queries, keys and values as `heads` gives them
        """
        query, key, value = self.heads(normed, rope_table)
        output: Tensor = self.linear_proj(attention(query, key, value, visibility))[0]
        return (output, query, key, value) if with_heads else (output,)

    def heads(self, normed: Tensor, rope_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this tensor rank's heads, [S, B, H, D]; queries and keys with their position."""
        query, key, value = self.get_query_key_value_tensors(normed)
        return rope(query, rope_table), rope(key, rope_table), value


class GatedMLP(MLP):
    """megatron-core's projections around our SwiGLU."""

    def forward(self, normed: Tensor) -> Tensor:
        """normed: [S, B, hidden]."""
        output: Tensor = self.linear_fc2(swiglu(self.linear_fc1(normed)[0]))[0]
        return output


class Layer(TransformerLayer):
    """One decoder layer. The sum with its last branch is left to the next norm, which needs it anyway."""

    def forward(
        self,
        hidden: Tensor,
        branch: Tensor | None,
        rope_table: Tensor,
        visibility: Visibility,
        with_heads: bool = False,
    ) -> tuple[Tensor, ...]:
        """hidden, branch: [S, B, hidden], whose sum is the layer's input; the same of its output comes back.

        with_heads: also hand out queries, keys and values, as in Attention.heads
        """
        normed, hidden = self.input_layernorm(hidden, branch)
        attended, *heads = self.self_attention(normed, rope_table, visibility, with_heads)
        normed, hidden = self.pre_mlp_layernorm(hidden, attended)
        return hidden, self.mlp(normed), *heads


def layer_spec(tensor_group: ProcessGroup) -> ModuleSpec:
    """Spec of one decoder layer whose projections are cut over a group."""
    projections = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=IdentityOp, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(Attention, {"attn_mask_type": AttnMaskType.causal}, projections),
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(GatedMLP, {"tp_group": tensor_group}, mlp),  # megatron-core gives it to its own MLP only
        ),
    )


def transformer_config(model: ModelSettings, dtype: torch.dtype, tp: int, sequence_parallel: bool) -> TransformerConfig:
    """megatron-core's view of a model. Pipeline fields stay at 1: stages are ours, layers get their global numbers."""
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.num_kv_heads,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        calculate_per_token_loss=True,  # gradients are summed over replicas, never averaged
        use_cpu_initialization=True,
        perform_initialization=False,  # titan.model.parameters draws every weight from its name
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
