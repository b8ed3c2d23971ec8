"""Tensors in Python: by our names and those of other programs, sliced, and as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.named_tensors import names_elsewhere
from castalia.checkpoint.opener import open_checkpoint
from castalia.storage.lazy import InMemory
from tests.checkpoint.made import FAMILIES, made


@pytest.fixture
def checkpoint():
    return made(FAMILIES["gpt_neox"])


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_names_of_hugging_face_give_what_its_folder_holds(family: str, tmp_path: Path) -> None:
    source = made(FAMILIES[family])
    plan = convert.plan_files("hf", source, WriteOptions())
    convert.write(plan, tmp_path / "hf", "mark", lambda count: None)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(source.model[name].read(), tensor), name
    assert open_checkpoint(tmp_path / "hf").model.keys() == source.model.keys()


def test_names_of_gpt_neox_are_known(checkpoint) -> None:
    ours = checkpoint.model["blocks.0.mlp.up.weight"].read()
    for theirs in ("sequential.2.mlp.dense_h_to_4h.weight", "sequential.2.mlp.linear1.weight"):
        assert torch.equal(checkpoint.model[theirs].read(), ours)
    assert "sequential.2.mlp.linear1.weight" not in checkpoint.model
    assert len(names_elsewhere(checkpoint.model, checkpoint.config.model)) > 2 * len(checkpoint.model)


def test_a_name_that_nobody_knows_comes_with_near_ones(checkpoint) -> None:
    with pytest.raises(KeyError, match=r"blocks.0.attn.qvk.weight; near it: blocks.0.attn.qkv.weight"):
        checkpoint.model["blocks.0.attn.qvk.weight"]
    with pytest.raises(KeyError, match=r"near it: gpt_neox.layers.0.attention.dense.weight"):
        checkpoint.model["gpt_neox.layers.0.attention.danse.weight"]
    with pytest.raises(KeyError, match=r"near it: embed.weight"):
        checkpoint.optimizer["embd.weight"]


def test_a_checkpoint_is_shown_in_ten_lines(checkpoint) -> None:
    lines = repr(checkpoint).splitlines()
    assert len(lines) <= 10 and "embed.weight: float32" in repr(checkpoint)


def test_tensors_behave(checkpoint) -> None:
    ref = checkpoint.model["blocks.1.mlp.up.weight"]
    whole = ref.read()
    for index in (0, -1, slice(1, 3), (slice(None), 2), (..., slice(-2, None)), (3, slice(1, 4)), slice(5, 2)):
        assert torch.equal(ref[index], whole[index]), index
    assert np.array_equal(np.asarray(ref), whole.numpy()) and np.asarray(ref, np.float64).dtype == np.float64
    assert torch.equal(torch.as_tensor(np.asarray(ref)), whole) and torch.equal(torch.as_tensor(ref), whole)
    assert len(ref) == len(whole) and [row.shape for row in ref] == [row.shape for row in whole]
    for index in (len(whole), (0, 0, 0), slice(None, None, 2)):
        with pytest.raises(IndexError):
            ref[index]
    rounded = InMemory(whole.bfloat16())
    assert np.asarray(rounded).dtype == np.float32 and repr(rounded) == f"bfloat16 {list(whole.shape)}, not read"
