"""Texts of a model of which one block at a time is in memory are those of the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from castalia.checkpoint.tensors import Checkpoint, Progress
from castalia.config.schema import RunConfig
from castalia.generate import packed_model
from castalia.generate.generation import generate
from castalia.generate.packed_model import has_bf16_kernels, maker, pack, packed_block
from castalia.loading import build_model
from castalia.plan.stream_plan import StreamPlan, generation_work, spread
from castalia.storage.lazy import InMemory
from castalia.streaming.stream_units import units_of
from castalia.streaming.streamed_model import Packing, StreamedTransformer

PROMPTS = ["In the beginning", "", "And", "the earth was without form", "And"]


def checkpoint_of(model) -> Checkpoint:
    tensors = {name: InMemory(p.detach()) for name, p in model.named_parameters()}
    return Checkpoint("memory", "native", tensors, None, Progress(), RunConfig(model=model.cfg))


def streamed(
    checkpoint: Checkpoint, dtype: torch.dtype, *, resident: int = 0, product=None, **plan
) -> StreamedTransformer:
    cfg = checkpoint.config.model
    units = units_of(checkpoint, cfg, dtype)
    work = generation_work(cfg, 30, 20, 5, 4)
    planned = StreamPlan(units.sizes(), work, 10**9, 5, spread(resident, cfg.num_layers), True, **plan)
    packing = product and Packing(lambda block: packed_block(block, product), lambda weight: product((weight, None)))
    return StreamedTransformer(cfg, units, planned, "memory", packing=packing)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9, "num_samples": 2}])
@pytest.mark.parametrize("update", [{}, {"position": "alibi"}, {"position": "learned", "max_positions": 32}], ids=str)
def test_texts_are_equal(make_model, tokenizer, update, sampling):
    """Also beyond the last position, where rows are read anew."""
    model = make_model(init_std=0.15, num_layers=5, **update)
    found = generate(streamed(checkpoint_of(model), torch.float32), tokenizer, PROMPTS, max_tokens=20, **sampling)
    assert found == generate(model, tokenizer, PROMPTS, max_tokens=20, **sampling)


def test_a_cache_on_disk_gives_the_same_texts(make_model, tokenizer):
    """Rows end one by one, so that the cache is copied."""
    model = make_model(init_std=0.15)
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "num_samples": 3, "stop": tuple("abcdefgh")}
    found = generate(streamed(checkpoint_of(model), torch.float32, cache_on_disk=True), tokenizer, PROMPTS, **options)
    assert found == generate(model, tokenizer, PROMPTS, **options)


@pytest.mark.parametrize("resident", [0, 1, 3])
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bf16"])
@pytest.mark.parametrize(
    "update", [{"parallel_residual": True}, {"parallel_residual": False}, {"pattern": ("mamba", "attention")}], ids=str
)
def test_packed_blocks_write_what_packed_models_do(make_model, tokenizer, update, int8, resident, monkeypatch):
    if not (int8 or has_bf16_kernels()):
        pytest.skip("this CPU has no bf16 kernels: a bf16 model is not packed here")
    monkeypatch.setattr(packed_model, "SMALL", 0)
    checkpoint = checkpoint_of(make_model(init_std=0.15, num_layers=3, **update))
    whole = build_model(checkpoint, dtype=torch.bfloat16)
    pack(whole, int8=int8, rows=5)
    model = streamed(checkpoint, torch.bfloat16, resident=resident, product=maker(torch.bfloat16, int8, 5))
    expected = generate(whole, tokenizer, PROMPTS, max_tokens=20)
    assert generate(model, tokenizer, PROMPTS, max_tokens=20) == expected
    assert generate(model, tokenizer, PROMPTS, max_tokens=20) == expected  # what stays was not overwritten


def test_the_smallest_budget_puts_the_cache_on_disk(make_model):
    from castalia.plan.stream_plan import PROGRAM_BYTES, plan_stream

    cfg = make_model().cfg
    units = units_of(checkpoint_of(make_model()), cfg, torch.float32)
    work = replace(generation_work(cfg, 30, 20, 5, 4), cache_each=10**8)
    least = PROGRAM_BYTES + units.sizes().always + work.working + work.bytes_each
    assert plan_stream(units.sizes(), work, least).cache_on_disk
    assert plan_stream(units.sizes(), work, least + 10**8 - 1).cache_on_disk
    assert not plan_stream(units.sizes(), work, least + 10**8).cache_on_disk
