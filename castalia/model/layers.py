"""The parts of a block: linear maps and embeddings that cast their parameters on use, and the MLP. Norms: `norms.py`.

Parameters may be fp32 while activations are bf16 or fp16: every module computes in the dtype of its input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import LoraConfig, ModelConfig
from castalia.config.tensor_table import row_of
from castalia.model.float8 import float8_linear
from castalia.model.kept_gradient import embedding


def gelu(x: Tensor) -> Tensor:
    """x times the share of a normal distribution below x. oneDNN's kernel, 2 to 14 times as fast, wants no strides."""
    return F.gelu(x.contiguous())


def gelu_tanh(x: Tensor) -> Tensor:
    """`gelu` by an approximation (Hendrycks & Gimpel, 1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "mish": F.mish,
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def is_slow_half(x: Tensor) -> bool:
    """Whether x is fp16 on a CPU, whose products are 10 to 40 times slower than those of fp32."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def held_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter where the model does not train and computes in `dtype`."""
    return torch.float32 if row_of(name).stays_fp32 else dtype


def hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a whole model, or a stage of it, hold its parameters in `dtype`, but for those that stay fp32; in place."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(held_dtype(name, dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the dtype of x: [..., in] -> [..., out]."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if is_slow_half(x):
        # Casting the weight in every call still costs less than the product in fp16.
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).half()
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input. Its values come from `init.py` or a checkpoint.

    With a LoRA adapter, `lora_a` [rank, in] and `lora_b` [out, rank], their scaled product is added to the weight.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    float8 = False  # whether it multiplies in float8 while it trains, see `float8.py`

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def reset_parameters(self) -> None:
        """Do nothing, in place of torch's random values."""

    def add_adapter(self, cfg: LoraConfig) -> None:
        """Add the two matrices of an adapter, with values unset."""
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, self.in_features, device=self.weight.device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, cfg.rank, device=self.weight.device))
        self.lora_scale, self.lora_dropout = cfg.scale, cfg.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`forward` with another bias, or none."""
        if self.lora_a is None or self.lora_b is None:
            return self.plain(x, bias)
        # [..., in] -> [..., rank] -> [..., out]; the product of the two matrices is never formed
        if is_slow_half(x) or type(x) is not Tensor:  # a DTensor, of whose output a rank may hold a summand
            low = linear(self.dropped(x), self.lora_a)
            return self.plain(x, bias) + linear(low, self.lora_b) * self.lora_scale
        rows = x.flatten(0, -2)
        out, low = self.plain(rows, bias), linear(self.dropped(rows), self.lora_a)
        # The product itself scales and adds, which would take two passes over the output. Not in place, as selective
        # activation checkpointing keeps the first output.
        whole = torch.addmm(out, low, self.lora_b.to(x.dtype).T, alpha=self.lora_scale)
        return whole.unflatten(0, x.shape[:-1])

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`product` without the adapter."""
        # Of no tokens, as where none has a label, there is no largest value.
        return (float8_linear if self.float8 and self.training and x.numel() else linear)(x, self.weight, bias)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the adapter, with dropout while training."""
        return F.dropout(x, self.lora_dropout, self.training)

    @property
    def whole_weight(self) -> Tensor:
        """The weight with its adapter, [out, in], for callers that compute the product themselves."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        return self.weight + self.lora_b @ self.lora_a * self.lora_scale


class Embedding(nn.Embedding):
    """An embedding whose values come from `init.py` or a checkpoint."""

    def reset_parameters(self) -> None:
        """Do nothing, in place of torch's random values."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., h]."""
        return embedding(tokens, self.weight)


class MLP(nn.Module):
    """down(activation(up x)), or gated: down(activation(gate x) * up x)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(cfg.hidden_size, cfg.mlp_width, cfg.mlp_bias)
        self.gate = Linear(cfg.hidden_size, cfg.mlp_width, cfg.mlp_bias) if cfg.gated_mlp else None
        self.down = Linear(cfg.mlp_width, cfg.hidden_size, cfg.mlp_bias)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., f] -> [..., h]."""
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(inner)
