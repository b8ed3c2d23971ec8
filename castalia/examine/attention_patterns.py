"""Which tokens each head looks at. The kernels of attention never form these weights, so they are computed apart."""

from __future__ import annotations

import torch
from torch import Tensor

from castalia.config.attention_kernels import KernelChoice
from castalia.model.attention import Recurrent
from castalia.model.loss import capped


class AttentionPatterns:
    """The weights of each layer's attention: `model(tokens, cache=patterns)`, then `patterns[layer]` [b, heads, t, t].

    Row q of a head says how much token q takes of each token; it sums to 1. Layers without attention have none. To the
    model it is a cache (`castalia.model.attention.Cache`) without earlier tokens, which attends step by step in place
    of a kernel: logits are those of the model up to rounding, and gradients flow.
    """

    gaps = grows = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """`device`: the model's."""
        self.device, self.layers = device, dict[int, Tensor]()

    def __getitem__(self, layer: int) -> Tensor:
        """The pattern of a layer in the last call, fp32. Raises KeyError for a layer without attention."""
        return self.layers[layer]

    def reserve(self, count: int) -> Tensor:
        """The places of the tokens, [1, t]."""
        self.layers = {}
        self.keys, self.end = torch.arange(count, device=self.device)[None], count
        return self.keys

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        choice: KernelChoice,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [b, n, t, d], k and v [b, kv, t, d] -> [b, n, t, d]. The weights are kept."""
        group = q.shape[1] // k.shape[1]  # query heads per key/value head
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = capped(scores, softcap)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf) if bias is None else scores + bias
        self.layers[layer] = scores.softmax(-1)
        return self.layers[layer].to(v.dtype) @ v

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """All tokens [b, t, h] of a layer without attention, from its first state on."""
        return module.advance(x, module.new_state(len(x), x.shape[1], x))

    def advance(self, count: int) -> None:
        """Note that all layers have seen the tokens."""
