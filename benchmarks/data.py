"""Index building, blending and loading, beside the NumPy calls that they cannot do without.

    python benchmarks/data.py [--documents 10000000] [--rounds 5] [--quick]

Sizes are synthetic, about 1,000 tokens a document. The index's peer is one cumsum, one searchsorted and two shuffles of
the index's own sizes, and must give the same arrays; the loader's is a copy of as many tokens. Sides take turns,
figures are medians, memory is the peak of NumPy's allocations in a pass that is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results

from castalia.config.schema import DataConfig, RunConfig, Source, TrainConfig
from castalia.data.blend import blend
from castalia.data.config_corpora import open_data
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.sample_index import build_packed

SEQ_LENGTH, SEED = 2048, 1234
STEP_TOKENS_PER_SECOND = 1e6  # of the training that the loader is to feed


def alternate(rounds: int, **sides: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each side, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    for name, found in seconds.items():
        results.record(name.replace("_", " "), found)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak_bytes(side: Callable[[], Any]) -> int:
    tracemalloc.start()
    side()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def numpy_index(sizes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same arrays with the plainest calls."""
    rng = np.random.RandomState(SEED)
    order = documents.astype(np.int32)
    rng.shuffle(order)
    ends = np.cumsum(sizes[order], dtype=np.int64)
    cuts = np.arange(0, ends[-1], SEQ_LENGTH)
    cuts = cuts[: (int(ends[-1]) - 1) // SEQ_LENGTH + 1]
    at = np.searchsorted(ends, cuts, side="right")
    starts = np.concatenate(([0], ends))[at]
    shuffle = np.arange(len(cuts) - 1, dtype=np.uint32)
    rng.shuffle(shuffle)
    return order, np.stack([at, cuts - starts], axis=1).astype(np.int32), shuffle


def index_row(num_documents: int, rounds: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 2000, num_documents).astype(np.int32)
    documents = np.arange(num_documents, dtype=np.int32)

    def ours() -> Any:
        return build_packed(sizes, documents, None, SEQ_LENGTH, SEED)

    index = ours()
    arrays = index.documents, index.bounds, index.order
    assert all(map(np.array_equal, arrays, numpy_index(sizes, documents))), "the index differs from NumPy's"
    seconds = alternate(rounds, ours=ours, numpy=lambda: numpy_index(sizes, documents))
    total, memory = sum(array.nbytes for array in arrays), peak_bytes(ours)
    print(
        f"index of {num_documents:,} documents, {sizes.sum(dtype=np.int64):,} tokens: {seconds['ours']:.2f} s, NumPy's "
        f"calls {seconds['numpy']:.2f} s ({seconds['ours'] / seconds['numpy']:.2f}x, target 1.3x); peak "
        f"{memory / 1e6:.0f} MB for arrays of {total / 1e6:.0f} MB ({memory / total:.2f}x, target 2x)"
    )


def blend_row(size: int, rounds: int) -> None:
    weights = np.arange(1, 9) / 36
    seconds = alternate(rounds, blend=lambda: blend(weights, size))["blend"]
    print(f"blend of {size:,} samples of 8 corpora: {seconds:.2f} s (target for 10,000,000: 20 s)")


def loader_row(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = np.random.default_rng(0).integers(1, 2000, 20_000)
        with DatasetWriter(f"{folder}/x", "u2") as writer:
            writer.add_many(np.random.default_rng(1).integers(0, 50_000, int(sizes.sum()), np.uint16), sizes)
        for mask in (False, True):
            _loader_row(folder, mask, rounds)


def _loader_row(folder: str, mask: bool, rounds: int) -> None:
    run = RunConfig(
        data=DataConfig(train=(Source(path=f"{folder}/x"),), seq_length=SEQ_LENGTH, mask_documents=mask),
        train=TrainConfig(steps=100, batch_size=32),
    )
    samples, steps = open_data(run), iter(range(1, 1 + rounds))
    source = np.frombuffer(Path(f"{folder}/x.bin").read_bytes(), "<u2", samples.batch(0).tokens.size)
    seconds = alternate(rounds, load=lambda: samples.batch(next(steps)), copy=lambda: source.astype(np.int64))
    share = seconds["load"] / (source.size / STEP_TOKENS_PER_SECOND)
    print(
        f"loading {source.size:,} tokens{' with documents masked' if mask else ''}: {seconds['load'] * 1e3:.2f} ms, "
        f"copying them {seconds['copy'] * 1e3:.2f} ms; {share:.2%} of a step at 1 M tokens/s (target 1%)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size, three rounds")
    results.option(parser)
    options = parser.parse_args()
    shrink, rounds = (100, 3) if options.quick else (1, options.rounds)
    index_row(options.documents // shrink, rounds)
    blend_row(options.documents // shrink, 1 if not options.quick else rounds)
    loader_row(10 * rounds)


if __name__ == "__main__":
    main()
