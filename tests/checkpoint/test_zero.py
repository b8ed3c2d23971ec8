"""Flat vectors are cut into parameters without reading more than is asked for."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint.zero import cut, parameter_groups, split_stages
from castalia.errors import CheckpointError
from castalia.storage.lazy import InMemory


class Counting:
    def __init__(self, tensor: torch.Tensor):
        self.held, self.shape, self.dtype_name, self.read_elements = InMemory(tensor), tuple(tensor.shape), "float32", 0

    def read(self, slices=None, out=None):
        result = self.held.read(slices, out)
        self.read_elements += result.numel()
        return result


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=8),
    st.integers(1, 5),
    st.booleans(),
)
def test_parameters_come_back_from_any_cut(shapes, ranks, stripped):
    named = {f"p{i}": shape for i, shape in enumerate(shapes)}
    tensors = {name: torch.randn(shape) for name, shape in named.items()}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    size = -(-len(flat) // (2 * ranks)) * 2
    padded = torch.cat([flat, torch.zeros(size * ranks - len(flat))])
    pieces = list(padded.split(size))
    if stripped:
        pieces = [piece[: max(0, len(flat) - rank * size)] for rank, piece in enumerate(pieces)]
    found = cut([InMemory(piece) for piece in pieces], named, "here")
    for name, tensor in tensors.items():
        assert found[name].shape == named[name] and torch.equal(found[name].read(), tensor)


def test_a_missing_piece_is_named():
    pieces = [InMemory(torch.zeros(10)), InMemory(torch.zeros(10))]
    for shape in [(30,), (4,)]:
        with pytest.raises(CheckpointError, match="20 elements, which does not fit"):
            cut(pieces, {"a": shape}, "here")


def test_slices_read_only_their_rows():
    pieces = [Counting(torch.randn(5000)) for _ in range(4)]
    found = cut(pieces, {"a": (100, 100), "b": (100, 100)}, "here")
    found["b"].read([slice(20, 30), slice(0, 100)])
    assert [piece.read_elements for piece in pieces] == [0, 0, 1000, 0]
    whole = torch.cat([piece.held.tensor for piece in pieces])[10000:].view(100, 100)
    assert torch.equal(found["b"].read([slice(45, 60), slice(3, 5)]), whole[45:60, 3:5])


def test_groups_put_norms_and_biases_last():
    names = [
        "0.word_embeddings.weight",
        "2.input_layernorm.scale",
        "2.attention.dense.weight",
        "2.attention.dense.bias",
    ]
    names += ["3.mlp.linear1.weight", "5.norm.weight", "6.weight"]
    shapes = dict.fromkeys(names, (2, 3))
    assert parameter_groups(shapes, [7], lambda s: 1, "here") == [shapes]
    decay, plain = parameter_groups(shapes, [3, 4], lambda s: 1, "here")
    assert list(decay) == [names[0], names[2], names[4]] and list(plain) == [names[1], names[3], names[5], names[6]]
    first, second, third = parameter_groups(shapes, [12, 6, 24], prod, "here")
    assert list(first) == [names[0], names[2]] and list(second) == [names[4]] and third == plain
    with pytest.raises(CheckpointError, match="groups do not fit"):
        parameter_groups(shapes, [7, 11, 24], prod, "here")


def test_stages_are_found_from_what_they_measure():
    layers = {0: {"e": (4,)}, 2: {"a": (2,), "b": (1,)}, 3: {"c": (3,)}, 5: {"n": (1,)}}
    stages = split_stages(layers, {}, [7, 4], prod, "here")
    assert [list(stage) for stage in stages] == [["e", "a", "b"], ["c", "n"]]
    tied = split_stages(layers, layers[0], [7, 8], prod, "here")
    assert list(tied[1]) == ["e", "c", "n"]
    for targets in ([6, 5], [7, 3], [7]):
        with pytest.raises(CheckpointError):
            split_stages(layers, {}, targets, prod, "here")
