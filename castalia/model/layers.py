"""The small parts of a block: linear maps and embeddings that cast where they are used, norms, and the MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import LoraConfig, ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "mish": F.mish,
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def is_slow_half(x: Tensor) -> bool:
    """CPUs multiply fp16 numbers 10 to 40 times slower than the same numbers in fp32."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the dtype of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if is_slow_half(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).half()
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """Computes in the input's dtype, whatever the parameters' dtype. Its values come from `init.py` or a checkpoint.

    With an adapter, `lora_a` [rank, in] and `lora_b` [out, rank], their product is added to the weight.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def reset_parameters(self) -> None:
        pass

    def add_adapter(self, cfg: LoraConfig) -> None:
        """Its values are left unset."""
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, self.in_features, device=self.weight.device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, cfg.rank, device=self.weight.device))
        self.lora_scale, self.lora_dropout = cfg.scale, cfg.dropout

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return out
        return out + linear(linear(self.dropped(x), self.lora_a), self.lora_b) * self.lora_scale

    def dropped(self, x: Tensor) -> Tensor:
        """What the adapter sees of the input while it trains."""
        return F.dropout(x, self.lora_dropout, self.training)

    @property
    def whole_weight(self) -> Tensor:
        """The weight with its adapter, for those that multiply by themselves."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        return self.weight + self.lora_b @ self.lora_a * self.lora_scale


class Embedding(nn.Embedding):
    """An embedding without a random start: its values come from `init.py` or a checkpoint."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    """Accumulates in fp32; the parameters take part in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:  # casts that do nothing take time too
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), or with eps outside the root x / (rms(x) + eps), as the original did until 2025."""

    def __init__(self, size: int, eps: float, eps_inside: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.eps_inside = eps, eps_inside

    def forward(self, x: Tensor) -> Tensor:
        if self.eps_inside:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return (wide / (rms + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


class ScaleNorm(nn.Module):
    """Vectors of one learned length: weight * x / max(|x|, eps)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = wide.norm(dim=-1, keepdim=True).clamp(min=self.eps)
        return (wide / length).to(x.dtype) * self.weight.to(x.dtype)


def build_norm(cfg: ModelConfig) -> nn.Module:
    match cfg.norm:
        case "layernorm":
            return LayerNorm(cfg.hidden_size, cfg.norm_eps)
        case "layernorm_no_params":
            return LayerNorm(cfg.hidden_size, cfg.norm_eps, elementwise_affine=False)
        case "rmsnorm":
            return RMSNorm(cfg.hidden_size, cfg.norm_eps, cfg.rms_eps_inside)
        case "scalenorm":
            return ScaleNorm(cfg.norm_eps)


class MLP(nn.Module):
    """down(activation(up x)), or gated: down(activation(gate x) * up x)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(cfg.hidden_size, cfg.mlp_width, cfg.mlp_bias)
        self.gate = Linear(cfg.hidden_size, cfg.mlp_width, cfg.mlp_bias) if cfg.gated_mlp else None
        self.down = Linear(cfg.mlp_width, cfg.hidden_size, cfg.mlp_bias)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(inner)
