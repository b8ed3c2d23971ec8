"""Rules are invertible, lazy, and treat weights and moments as each needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint.rules import (
    Chain,
    ConcatRanks,
    Interleave,
    Inverse,
    OnEachRank,
    PermuteRows,
    Rule,
    Same,
    SameOnRanks,
    SumOverRanks,
    Transpose,
    drift,
    per_block,
    to_ours,
    to_theirs,
)
from castalia.errors import CheckpointError
from castalia.storage.derived import Joined, Padded, Part, Permuted, Transposed
from castalia.storage.lazy import InMemory

ROLES = ("weight", "master", "exp_avg", "exp_avg_sq")


class Counting:
    """A held tensor that counts the elements read of it."""

    def __init__(self, tensor: torch.Tensor):
        self.held, self.shape, self.dtype_name, self.read_elements = InMemory(tensor), tuple(tensor.shape), "float32", 0

    def read(self, slices=None, out=None):
        result = self.held.read(slices, out)
        self.read_elements += result.numel()
        return result


@st.composite
def op_and_theirs(draw):
    """An operation with tensors of theirs it can be applied to."""
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    d, per, kv, h = (draw(st.integers(1, 3)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    group = (per * d, d, d)
    qkv = [random(kv * size, h) for size in group]
    split_groups = Chain(Inverse(Interleave(tuple(kv * size for size in group))), Interleave(group, kv))
    copy = random(h)
    return draw(
        st.sampled_from(
            [
                (Same(), [random(h, d)]),
                (Transpose(), [random(h, d)]),
                (PermuteRows((3, kv, d), (1, 0, 2)), [random(3 * kv * d, h)]),
                (PermuteRows((kv, d, 3), (0, 2, 1)), [random(3 * kv * d)]),
                (Interleave(group, kv), qkv),
                (Inverse(Interleave(group, kv)), [random(kv * sum(group), h)]),
                (ConcatRanks(ranks), [random(d, h) for _ in range(ranks)]),
                (ConcatRanks(ranks, dim=1), [random(d, h) for _ in range(ranks)]),
                (SameOnRanks(ranks), [copy] * ranks),
                (OnEachRank(split_groups, ConcatRanks(ranks)), [random(kv * sum(group), h) for _ in range(ranks)]),
                (OnEachRank(Inverse(Interleave((d, d))), ConcatRanks(ranks)), [random(2 * d) for _ in range(ranks)]),
            ]
        )
    )


@settings(max_examples=150, deadline=None)
@given(op_and_theirs(), st.sampled_from(ROLES))
def test_backward_undoes_forward(case, role):
    op, theirs = case
    back = op.backward(op.forward([InMemory(t) for t in theirs], role), role)
    assert len(back) == len(theirs)
    for ref, tensor in zip(back, theirs, strict=True):
        assert ref.shape == tuple(tensor.shape)
        assert torch.equal(ref.read(), tensor)


@settings(max_examples=150, deadline=None)
@given(op_and_theirs(), st.data())
def test_a_slice_is_a_slice_of_the_whole(case, data):
    op, theirs = case
    for ref in op.forward([InMemory(t) for t in theirs], "weight"):
        whole = ref.read()
        assert whole.shape == ref.shape
        starts = [data.draw(st.integers(0, size)) for size in ref.shape]
        slices = tuple(slice(a, data.draw(st.integers(a, size))) for a, size in zip(starts, ref.shape, strict=True))
        assert torch.equal(ref.read(slices), whole[slices])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_replicas_that_agree_come_back_bit_for_bit(ranks):
    copy = torch.randn(1000)
    (ours,) = SameOnRanks(ranks).forward([InMemory(copy)] * ranks, "weight")
    assert torch.equal(ours.read(), copy)


def test_summed_bias_sums_weights_and_averages_moments():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    op = SumOverRanks(2)
    for role, expected in [("weight", a + b), ("master", a + b), ("exp_avg", (a + b) / 2), ("exp_avg_sq", (a + b) / 2)]:
        (ours,) = op.forward([InMemory(a), InMemory(b)], role)
        assert torch.equal(ours.read(), expected)
        halves = op.backward([ours], role)
        assert torch.equal(halves[0].read(), (a + b) / 2) and torch.equal(halves[1].read(), (a + b) / 2)


def test_drift_is_reported_for_copies_that_differ():
    refs = {
        "norm": [InMemory(torch.tensor([1.0, 2.0])), InMemory(torch.tensor([1.0, 2.5]))],
        "same": [InMemory(torch.ones(2))] * 2,
    }
    ours = to_ours([Rule("a", "norm", SameOnRanks(2)), Rule("b", "same", SameOnRanks(2))], refs)
    assert torch.equal(ours["a"].read(), torch.tensor([1.0, 2.25]))
    assert drift(ours) == {"a": 0.5}


def test_a_slice_reads_only_what_it_needs():
    sources = [Counting(torch.randn(100, 4)) for _ in range(4)]
    Joined(tuple(sources)).read([slice(150, 160), slice(0, 4)])
    assert [source.read_elements for source in sources] == [0, 40, 0, 0]
    source = Counting(torch.randn(100, 4))
    Part(Padded(source, 200), 90, 150).read([slice(0, 20), slice(0, 1)])
    assert source.read_elements == 10
    Transposed(source).read([slice(0, 1), slice(0, 5)])
    assert source.read_elements == 15
    Permuted(source, (2, 50), (1, 0)).read([slice(0, 100), slice(2, 3)])
    assert source.read_elements == 115


def test_steps_are_refused():
    with pytest.raises(ValueError, match="step"):
        InMemory(torch.zeros(4)).read([slice(0, 4, 2)])


def test_tables_name_what_is_missing_and_what_is_left():
    rules = per_block([Rule("blocks.{i}.w", "{layer}.w")], 2, first=2)
    ref = [InMemory(torch.zeros(1))]
    ours = to_ours(rules, {"2.w": ref, "3.w": ref, "3.inv_freq": ref}, ignore=r"inv_freq$")
    assert set(ours) == {"blocks.0.w", "blocks.1.w"}
    assert set(to_theirs(rules, ours)) == {"2.w", "3.w"}
    with pytest.raises(CheckpointError, match=r"missing: 3\.w; not understood: 4\.w"):
        to_ours(rules, {"2.w": ref, "4.w": ref})
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.w; the target has no place for: head"):
        to_theirs(rules, {"blocks.0.w": ref[0], "head": ref[0]})


def test_gated_halves_are_merged_by_rank():
    """Each rank holds [up; gate]: plain concatenation would mix the two."""
    up, gate = torch.arange(4.0), torch.arange(4.0) + 10
    per_rank = [InMemory(torch.cat([up[r * 2 : r * 2 + 2], gate[r * 2 : r * 2 + 2]])) for r in range(2)]
    rule = Rule("up gate", "linear1", OnEachRank(Inverse(Interleave((2, 2))), ConcatRanks(2)))
    ours = to_ours([rule], {"linear1": per_rank})
    assert torch.equal(ours["up"].read(), up) and torch.equal(ours["gate"].read(), gate)
    back = to_theirs([rule], ours)["linear1"]
    assert all(torch.equal(b.read(), p.read()) for b, p in zip(back, per_rank, strict=True))


def read_rows(rule_op, *tensors: str) -> str:
    """What an operation makes of tensors whose rows are these words."""
    words = [word for tensor in tensors for word in tensor.split()]
    numbers = iter(range(len(words)))
    refs = [InMemory(torch.tensor([[float(next(numbers))] for _ in tensor.split()])) for tensor in tensors]
    (result,) = rule_op.forward(refs, "weight")
    return " ".join(words[int(row)] for row in result.read().flatten())


def test_the_examples_of_the_docstrings() -> None:
    assert read_rows(PermuteRows((3, 2, 1), (1, 0, 2)), "q0 q1 k0 k1 v0 v1") == "q0 k0 v0 q1 k1 v1"
    assert read_rows(Interleave((2, 1, 1), 2), "q0 q1 q2 q3", "k0 k1", "v0 v1") == "q0 q1 k0 v0 q2 q3 k1 v1"
    assert read_rows(ConcatRanks(2), "r0 r1 r2 r3", "r4 r5 r6 r7") == "r0 r1 r2 r3 r4 r5 r6 r7"
