"""Any chain of conversions between formats that hold a model gives its bits back: layouts, eras, dtypes, families."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint.tensors import Checkpoint, Progress
from castalia.config.schema import ModelConfig
from tests.checkpoint.made import made
from tests.checkpoint.test_write_neox import DTYPES, MODELS, OLD, assert_exact, divisible, write

HUGGING_FACE = ("parallel", "sequential tied", "sequential tied wide", "llama")
MEGATRON = ("sequential tied", "sequential tied wide")
ROWS = {  # of the vocabulary: tokens, padding
    "no padding": {"vocab_size": 120, "vocab_multiple": 8},
    "padded": {"vocab_size": 115, "vocab_multiple": 64},
}


@st.composite
def hops(draw: st.DrawFn, kind: str, model: ModelConfig, dtype: torch.dtype) -> dict:
    """Arguments of `write` for a format and layout that can hold the model."""
    targets = ["neox head", "neox head", "native"]
    targets += ["neox v1"] * (kind in OLD and dtype != torch.bfloat16)
    targets += ["hf"] * (kind in HUGGING_FACE) + ["megatron-deepspeed head"] * (kind in MEGATRON)
    to, _, era = draw(st.sampled_from(targets)).partition(" ")
    if not era:
        return {"to": to}
    stages = {"head": [0, 1, 2, 4], "v1": [0, 1, 2]}[era]
    return {
        "to": to,
        "era": era,
        "tp": draw(st.sampled_from([size for size in (1, 2, 4, 8) if model.kv_heads % size == 0])),
        "pp": draw(st.sampled_from(stages[1:] if to == "megatron-deepspeed" else stages)),
        "dp": draw(st.sampled_from([1, 2, 3])),
        "zero": draw(st.sampled_from([0, 1] if era == "head" or dtype == torch.float16 else [0])),
    }


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Checkpoint, list[dict]]:
    """A checkpoint whose copies on ranks agree, and where it goes."""
    kind = draw(st.sampled_from(sorted(MODELS)))
    model = MODELS[kind].model_copy(update=ROWS[draw(st.sampled_from(sorted(ROWS)))])
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    source = divisible(made(model, draw(st.integers(0, 99)), dtype=dtype))
    source = replace(source, progress=Progress(step=9, skipped=2, tokens=2048 * 4))
    return source, draw(st.lists(hops(kind, model, dtype), min_size=2, max_size=3))


def travel(journey: tuple[Checkpoint, list[dict]], factory: pytest.TempPathFactory) -> None:
    """Every hop starts from the files of the one before; weights, masters, moments and steps stay what they were."""
    source, route = journey
    folder, found = factory.mktemp("journey"), source
    for number, hop in enumerate(route):
        found = write(found, folder / str(number), **hop)
        assert_exact(source, found)


@settings(max_examples=6, deadline=None)
@given(journey=journeys())
def test_there_and_back(journey: tuple[Checkpoint, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> None:
    travel(journey, tmp_path_factory)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(journey=journeys())
def test_there_and_back_again(journey: tuple[Checkpoint, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> None:
    travel(journey, tmp_path_factory)
