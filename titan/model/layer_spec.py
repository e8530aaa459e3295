"""megatron-core's transformer layer with our norm, attention and residual plugged in as spec submodules."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from titan.config.settings import ModelSettings
from titan.ops.attention import grouped_query_attention
from titan.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm that also works on a slice of the sequence; megatron-core's own asserts that away on CPU."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class CoreAttention(nn.Module):
    """The part of attention between the projections; the mask comes with the batch, causal when there is none."""

    def __init__(self, **_: Any):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        """Shapes as in titan.ops.attention."""
        return grouped_query_attention(query, key, value, mask)


def add_residual(training: bool, fused: bool) -> Any:
    """megatron-core's hook for bias, dropout and residual; titan has neither bias nor dropout."""

    def add(output_and_bias: tuple[Tensor, None], residual: Tensor, probability: float) -> Tensor:
        return residual + output_and_bias[0]

    return add


def layer_spec() -> ModuleSpec:
    """Spec of one decoder layer."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(MLP, submodules=mlp),
            mlp_bda=add_residual,
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
