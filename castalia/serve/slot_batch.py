"""Texts of different lengths that take one step together, each with keys and values of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castalia.generate.kv_cache import KVCache
from castalia.model.attention import Recurrent
from castalia.model.positions import score_bias, visible
from castalia.model.transformer import Transformer

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel


class SlotBatch:
    """A `castalia.model.attention.Cache` of one new token for each row, and of rows that only pad the batch.

    Attention runs row by row over exactly the keys of that row, so no text depends on the lengths of the others.
    """

    gaps, grows = False, True

    def __init__(self, model: Transformer | SplitModel, caches: Sequence[KVCache], width: int) -> None:
        """`caches` have one row each. `width`: rows of the batch; those after the caches are padding."""
        # What this process holds of a split model.
        self.stage: Transformer = model if isinstance(model, Transformer) else model.stage
        self.caches = caches
        lengths = [cache.length for cache in caches]
        self.end = max(lengths) + 1
        places = torch.tensor([*lengths, *[0] * (width - len(caches))], device=model.device)
        self.keys = places[:, None]  # [width, 1]: of the new tokens alone, since each row masks its own
        self.biases: dict[int | None, list[Tensor | None]] = {}  # by window: of each row, the same in all layers

    def reserve(self, count: int) -> Tensor:
        """The places of the new tokens: [width, 1]."""
        for cache in self.caches:
            cache.reserve(count)
        return self.keys

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of each row to its own tokens: q [width, n, 1, d] -> the same shape, 0 for padding."""
        choice, _ = options.pop("choice"), options.pop("bias")
        window = self.stage.cfg.window_of(layer)
        if window not in self.biases:
            self.biases[window] = [self._bias(cache, q, window) for cache in self.caches]
            self.masked = self.stage.choice(q, "bias", self)
        outputs, biases = [], self.biases[window]
        # In Python every operation counts, so that rows are taken apart and put together by one each.
        for cache, bias, *own in zip(self.caches, biases, q.split(1), k.split(1), v.split(1), strict=False):
            kernel = choice if bias is None else self.masked
            outputs.append(cache.attend(layer, *own, choice=kernel, bias=bias, **options))
        if padding := len(q) - len(outputs):
            outputs.append(q.new_zeros(padding, *q.shape[1:]))
        return torch.cat(outputs)

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """Each row after its own state: x [width, 1, h] -> the same shape.

        States of one size go through the layer together, padding with a new one. Those that grow with their text, as
        gMLP's do, go row by row, and padding is 0.
        """
        states = [cache.state(layer, module, own) for cache, own in zip(self.caches, x.split(1), strict=False)]
        if not have_one_size(module, x):
            outputs = torch.zeros_like(x)
            for row, state in enumerate(states):
                outputs[row : row + 1] = module.advance(x[row : row + 1], state)
            return outputs
        padding = module.new_state(len(x) - len(states), 1, x)
        together = [torch.cat(parts) for parts in zip(*states, padding, strict=True)]
        outputs = module.advance(x, together)
        for number, part in enumerate(together):
            for state, value in zip(states, part.split(1), strict=False):
                state[number].copy_(value)
        return outputs

    def advance(self, count: int) -> None:
        """Note that every row has one token more."""
        for cache in self.caches:
            cache.advance(count)

    def _bias(self, cache: KVCache, q: Tensor, window: int | None) -> Tensor | None:
        """ALiBi's distances, or a window that hides early keys: [1, 1 or n, 1, k]."""
        if self.stage.alibi is None and (window is None or cache.end <= window + 1):
            return None
        own, keys = cache.places[:, cache.length : cache.end], cache.places[:, : cache.end]
        return score_bias(own, keys, visible(own, keys, window), self.stage.alibi, q.dtype)


def have_one_size(module: Recurrent, x: Tensor) -> bool:
    """Whether the layer's states are as large for a long text as for a short one, for input like x [rows, 1, h]."""
    short, long = (module.new_state(1, capacity, x.to("meta")) for capacity in (1, 2))
    return all(a.shape == b.shape for a, b in zip(short, long, strict=True))


def exact_widths(model: Transformer | SplitModel, widths: Sequence[int]) -> list[int]:
    """The widths of a batch in which a row gets the same bits, wherever it stands and however many there are.

    Kernels add in an order that depends on the number of rows, a vector for instance in another than a matrix, so it
    is tried out: a text takes one step in batches of each width, and the largest set of widths that agree is returned.
    Raises ConfigError as the model does.
    """
    found: dict[bytes, list[int]] = {}
    size = model.cfg.vocab_size or model.cfg.padded_vocab_size
    tokens = [(7919 * place + 11) % size for place in range(4)]
    for width in sorted(widths):
        cache = KVCache(1, len(tokens), model.device, model.cache_dtype)
        model.hidden(torch.tensor([tokens[:-1]], device=model.device), cache=cache)
        batch = SlotBatch(model, [_same(cache) for _ in range(width)], width)
        hidden = model.hidden(torch.tensor([[tokens[-1]]] * width, device=model.device), cache=batch)[:, 0]
        logits = model.logits(hidden).float().cpu()  # [width, V]
        if all(torch.equal(row, logits[0]) for row in logits):
            found.setdefault(logits[0].numpy().tobytes(), []).append(width)
    # Of sets that are equally large, the one with the widest batch.
    return max(found.values(), key=lambda same: (len(same), same[-1]))


def _same(cache: KVCache) -> KVCache:
    """Another cache with copies of the keys, values and states."""
    copy = KVCache(1, cache.capacity, cache.places.device, cache.dtype)
    copy.layers = {layer: (k.clone(), v.clone()) for layer, (k, v) in cache.layers.items()}
    copy.states = {layer: [part.clone() for part in state] for layer, state in cache.states.items()}
    copy.length = copy.end = cache.length
    return copy
