"""Norms: of the residual stream, and of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError


class LayerNorm(nn.LayerNorm):
    """LayerNorm with statistics in fp32 and parameters cast to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        if self.weight is None or self.weight.dtype == x.dtype:  # even a cast that changes nothing takes time
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight (Zhang & Sennrich, 1910.07467).

    With eps outside of the root it is x / (rms(x) + eps), as in GPT-NeoX until 2025. A zero-centered norm multiplies
    by 1 + weight, in fp32, as Gemma does.
    """

    def __init__(self, size: int, eps: float, eps_inside: bool = True, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.eps_inside, self.zero_centered = eps, eps_inside, zero_centered

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        if self.zero_centered:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + 1, self.eps).to(x.dtype)
        if self.eps_inside:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()  # squares of fp16 values may overflow
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return (wide / (rms + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


class ScaleNorm(nn.Module):
    """weight * x / max(|x|, eps), with a single weight: all vectors get one learned length (1910.05895)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        wide = x.float()  # as above
        length = wide.norm(dim=-1, keepdim=True).clamp(min=self.eps)
        return (wide / length).to(x.dtype) * self.weight.to(x.dtype)


def build_norm(cfg: ModelConfig, size: int | None = None) -> nn.Module:
    """The norm that `model.norm` names, over the hidden size or another one."""
    size = size or cfg.hidden_size
    match cfg.norm:
        case "layernorm":
            return LayerNorm(size, cfg.norm_eps)
        case "layernorm_no_params":
            return LayerNorm(size, cfg.norm_eps, elementwise_affine=False)
        case "rmsnorm":
            return RMSNorm(size, cfg.norm_eps, cfg.rms_eps_inside, cfg.zero_centered_norms)
        case "scalenorm":
            return ScaleNorm(cfg.norm_eps)


class JointHeadsNorm(nn.Module):
    """The qk norm of GPT-NeoX: one LayerNorm over all heads and dimensions together, for queries and for keys."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.kv_heads != cfg.num_heads:
            raise ConfigError(
                f"model.qk_norm has one weight for queries and keys: model.num_kv_heads={cfg.kv_heads} must equal "
                f"model.num_heads={cfg.num_heads}; set num_kv_heads to {cfg.num_heads} or qk_norm to false"
            )
        self.weight = nn.Parameter(torch.ones(cfg.num_heads, cfg.head_size))
        self.bias = nn.Parameter(torch.zeros(cfg.num_heads, cfg.head_size))
        self.eps = cfg.norm_eps

    def forward(self, qk: Tensor) -> Tensor:
        """[b, t, n, query + key, d] -> the same shape."""
        weight, bias = self.weight.to(qk.dtype), self.bias.to(qk.dtype)
        normed = [F.layer_norm(part, weight.shape, weight, bias, self.eps) for part in qk.unbind(-2)]
        return torch.stack(normed, dim=-2)


class EachHeadNorm(nn.Module):
    """The model's kind of norm, without a bias, of each head, with a weight of its own for each."""

    def __init__(self, cfg: ModelConfig, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * cfg.head_size))
        self.shape, self.eps, self.centers = (heads, cfg.head_size), cfg.norm_eps, cfg.norm == "layernorm"

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, heads * d] -> the same shape."""
        x = x.unflatten(-1, self.shape)
        normed = (F.layer_norm if self.centers else F.rms_norm)(x, self.shape[1:], eps=self.eps)
        return (normed * self.weight.view(self.shape).to(x.dtype)).flatten(-2)


def build_heads_norm(cfg: ModelConfig, heads: int) -> nn.Module:
    """The norm of queries, or of keys, that a word in `model.qk_norm` names: [..., heads * d], or heads [..., d]."""
    if cfg.qk_norm == "each_head":
        return EachHeadNorm(cfg, heads)
    return build_norm(cfg, cfg.head_size * (heads if cfg.qk_norm == "width" else 1))


def normed_heads(qk: Tensor, q_norm: nn.Module, k_norm: nn.Module, by_head: bool) -> Tensor:
    """Queries and keys through their norms: [b, t, kv, group + key, d] -> the same shape."""
    q, k = qk[..., :-1, :], qk[..., -1:, :]  # [b, t, kv, group, d], [b, t, kv, 1, d]
    if by_head:
        return torch.cat((q_norm(q), k_norm(k)), dim=-2)
    # [b, t, n d], [b, t, kv d] through the norm and back
    return torch.cat([norm(x.flatten(2)).view(x.shape) for norm, x in ((q_norm, q), (k_norm, k))], dim=-2)
