import weakref
from itertools import chain

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.generate.kv_cache import KVCache

TOKENS = torch.randint(257, (3, 24), generator=torch.Generator().manual_seed(0))
VARIANTS = [
    {},
    {"num_kv_heads": 4, "qk_norm": True},
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "alibi"},
    {"position": "none"},
    {"sliding_window": 5},
    {"sliding_window": 5, "window_pattern": (True, False), "rotary_pattern": (False, True)},
    {"position": "alibi", "sliding_window": 5},
    {"parallel_residual": True, "rotary_pct": 0.5},
]


def cache_for(model, rows: int = 3, capacity: int = 30) -> KVCache:
    return KVCache(rows, capacity, torch.device("cpu"))


@pytest.mark.parametrize("update", VARIANTS, ids=str)
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [9] + [1] * 15, [9, 5, 10]], ids=len)
@torch.inference_mode()
def test_cached_equals_uncached(make_model, update, chunks):
    model = make_model(**update)
    cache = cache_for(model)
    parts = [model(part, cache=cache) for part in TOKENS.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS), atol=2e-5, rtol=1e-5)
    assert cache.length == 24


@pytest.mark.parametrize("update", VARIANTS, ids=str)
@torch.inference_mode()
def test_ragged_rows_equal_each_row_alone(make_model, update):
    """Rows of 9, 3 and 6 tokens, padded behind; then five more for each."""
    model = make_model(**update)
    cache = cache_for(model)
    lengths = torch.tensor([9, 3, 6])
    model(TOKENS[:, :9].where(torch.arange(9) < lengths[:, None], 0), cache=cache)
    cache.set_lengths(lengths.tolist())
    for step in range(5):
        tokens = TOKENS[torch.arange(3), lengths + step][:, None]
        logits = model(tokens, cache=cache)[:, 0]
        alone = torch.stack([model(TOKENS[i : i + 1, : n + step + 1])[0, -1] for i, n in enumerate(lengths.tolist())])
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [1]], ids=str)
@torch.inference_mode()
def test_rows_that_are_kept_go_on_as_alone(make_model, kept):
    model = make_model()
    cache = cache_for(model)
    lengths = torch.tensor([9, 3, 3])
    model(TOKENS[:, :9].where(torch.arange(9) < lengths[:, None], 0), cache=cache)
    cache.set_lengths(lengths.tolist())
    cache.keep(kept)
    for step in range(3):
        logits = model(torch.stack([TOKENS[i, lengths[i] + step] for i in kept])[:, None], cache=cache)[:, 0]
        alone = torch.stack([model(TOKENS[i : i + 1, : lengths[i] + step + 1])[0, -1] for i in kept])
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)


class Living(TorchDispatchMode):
    """How many of some tensors there are whenever rows are chosen."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.references, self.numbers = [weakref.ref(tensor) for tensor in tensors], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            self.numbers.append(sum(reference() is not None for reference in self.references))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_dropping_rows_copies_one_layer_at_a_time(make_model):
    model = make_model(num_layers=4)
    cache = cache_for(model)
    model(TOKENS, cache=cache)
    with Living(chain(*cache.layers.values())) as living:
        cache.keep([0, 2])
    assert living.numbers == [8, 8, 6, 6, 4, 4, 2, 2]


@torch.inference_mode()
def test_cached_equals_uncached_in_bf16(make_model):
    model = make_model()
    model.compute_dtype = torch.bfloat16
    cache = cache_for(model)
    parts = [model(part, cache=cache) for part in TOKENS.split([9] + [1] * 15, dim=1)]
    expected = model(TOKENS).float()
    assert (torch.cat(parts, dim=1).float() - expected).abs().max() < 0.1 * expected.std()


@torch.inference_mode()
def test_no_mask_for_rows_of_equal_length(make_model, monkeypatch):
    """A mask would forbid the kernels' fast paths."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr("castalia.model.attention.F.scaled_dot_product_attention", spy)
    model = make_model()
    cache = cache_for(model)
    for part in TOKENS.split([9] + [1] * 15, dim=1):
        model(part, cache=cache)
    assert len(masks) == 2 * 16 and all(mask is None for mask in masks)
