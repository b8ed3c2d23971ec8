"""Host copies of tensors that are to be saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castalia.checkpoint.host_copies import HostCopies, copy_through


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 24))
def test_bytes_of_any_sizes_go_through_a_small_ring(sizes, half):
    """Where there is a GPU the ring is page-locked; nothing else of that kind is ever taken."""
    sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    ring = [torch.zeros(half, dtype=torch.uint8) for _ in range(2)]
    copy_through(ring, zip(sources, targets, strict=True))
    assert all(map(torch.equal, targets, sources))


def test_memory_is_kept_from_save_to_save():
    copies = HostCopies()
    tensors = {"a": torch.randn(3, 5).T, "b": torch.tensor(2), "c": torch.randn(0)}
    first = copies.take(tensors)
    addresses = {name: copy.data_ptr() for name, copy in first.items()}
    tensors["a"] += 1
    second = copies.take(tensors)
    assert {name: copy.data_ptr() for name, copy in second.items()} == addresses
    for name, tensor in tensors.items():
        assert torch.equal(second[name], tensor) and second[name].is_contiguous()
    third = copies.take({"a": torch.zeros(2)})  # another tensor by that name, and no others
    assert third["a"].shape == (2,) and copies.kept.keys() == {"a"}


@pytest.mark.gpu
def test_all_tensors_of_a_gpu_share_one_page_locked_ring(monkeypatch):
    monkeypatch.setattr("castalia.checkpoint.host_copies.HALF_RING_BYTES", 1000)
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    tensors = {f"{dtype}{n}": torch.randn(n, 7, device="cuda").to(dtype).T for dtype in kinds for n in (1, 100, 333)}
    wanted, copies = {name: tensor.cpu() for name, tensor in tensors.items()}, HostCopies()
    found = copies.take(tensors)
    for tensor in tensors.values():
        tensor.zero_()  # training goes on: the copies are complete
    assert all(torch.equal(found[name], value) and not found[name].is_pinned() for name, value in wanted.items())
    assert [(len(half), half.is_pinned()) for half in copies.ring] == [(1000, True)] * 2
