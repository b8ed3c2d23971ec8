"""Conversions stream: anonymous memory stays under two of the largest tensors and 400 MB, flat vectors included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.convert import ALLOWED_BYTES, convert, make_source, size_of, timed
from castalia.config.schema import ModelConfig

MODEL = ModelConfig(
    num_layers=2, hidden_size=2048, num_heads=16, vocab_size=4096, rotary_pct=0.25, parallel_residual=True,
    max_positions=64,
)  # fmt: skip
LARGEST = 4 * max(MODEL.vocab_size, MODEL.mlp_width) * MODEL.hidden_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see anonymous memory")
def test_memory_is_bounded_at_any_size(tmp_path: Path) -> None:
    """Each in a process of its own, sampled; the checkpoint is several times what is allowed."""
    make_source(tmp_path / "native", MODEL)
    allowed = 2 * LARGEST + ALLOWED_BYTES
    assert size_of(tmp_path / "native") > 2.5 * allowed
    for kind in (None, "q8_0"):  # one file, and so one writer
        _, peak = timed(convert, tmp_path / "native", tmp_path / f"{kind}.gguf", "gguf", None, kind)
        assert peak < 2 * LARGEST < (tmp_path / "None.gguf").stat().st_size / 3, (kind, peak)
    hops = [
        ("native", "sharded", "neox", "tp=2,pp=1,dp=2,zero=1"),
        ("sharded", "again", "neox", "tp=4,pp=2,dp=3,zero=1"),
        ("again", "hf", "hf", None),
        ("hf", "flat", "neox", "tp=1,pp=0,dp=1,zero=0"),
        ("flat", "back", "native", None),
    ]
    for source, target, form, layout in hops:
        _, peak = timed(convert, tmp_path / source, tmp_path / target, form, layout)
        assert peak < min(allowed, size_of(tmp_path / target) / 4), (target, peak)
        shutil.rmtree(tmp_path / source)
    shutil.rmtree(tmp_path / "back")
