"""Blocks that go to a device through buffers on the host give what the whole model gives."""

from __future__ import annotations

import pytest
import torch

from castalia.checkpoint.restore import architecture
from castalia.loading import build_model
from castalia.plan.stream_plan import EvaluationShape, StreamPlan, evaluation_work, spread
from castalia.streaming.stream_units import units_of
from castalia.streaming.streamed_model import StreamedTransformer
from tests.checkpoint.made import FAMILIES, made
from tests.streaming.test_streamed_model import OTHERS, tokens_of


def copied(kind: str, device: torch.device, dtype: torch.dtype, resident: int) -> None:
    checkpoint = made({**FAMILIES, **OTHERS}[kind], dtype=torch.bfloat16, optimizer=False)
    cfg = architecture(checkpoint)
    units = units_of(checkpoint, cfg, dtype)
    work = evaluation_work(cfg, EvaluationShape(16, 2, 6, False), dtype.itemsize)
    plan = StreamPlan(units.sizes(), work, 10**9, 2, spread(resident, cfg.num_layers), False)
    model = StreamedTransformer(cfg, units, plan, checkpoint.path, device=device)
    whole = build_model(checkpoint, device, dtype)
    for seed in range(4):  # buffers on both sides are used again
        tokens = tokens_of(cfg, seed=seed).to(device)
        calls = [(tokens, {}), (tokens.flip(1), {})]
        for x, (ids, _) in zip(model.hidden_each(calls), calls, strict=True):
            assert torch.equal(x, whole.hidden(ids))
        assert torch.equal(model(tokens, tokens)[0], whole(tokens, tokens)[0])
    model.close()


@pytest.mark.parametrize("kind", ["gpt2", "deep"])
@pytest.mark.parametrize("resident", [0, 1])
@torch.no_grad()
def test_copies_are_computed_with_in_place_of_what_was_read(kind: str, resident: int) -> None:
    """On the processor, where copies are plain ones: what is tested is that no buffer is given away too early."""
    copied(kind, torch.device("cpu"), torch.float32, resident)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "deep", "llama"])
@pytest.mark.parametrize("resident", [0, 1])
@torch.no_grad()
def test_copies_on_a_stream_of_their_own_are_complete_when_they_are_used(kind, resident, dtype) -> None:
    copied(kind, torch.device("cuda"), dtype, resident)
