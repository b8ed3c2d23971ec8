"""How fast `castalia data seen` looks for texts in a corpus, against reading its bytes once.

    python benchmarks/seen.py [--megabytes 256] [--dtype uint16] [--rounds 3]

The corpus is made up: ids of a vocabulary of 50,000 as uneven as words are. The texts are 30 ids long, half of them in
the corpus once. Times are CPU seconds of one thread, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import results

from castalia.data.seen import TOKENS_AT_ONCE
from castalia.data.text_search import find_runs

LENGTH = 30  # ids of a text


def best(rounds: int, row: str, work: Callable[[], object]) -> float:
    """CPU seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    results.record(row, seconds, "cpu")
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("uint16", "int32"), default="uint16")
    results.option(parser)
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    tokens = (
        draw.integers(0, 50_000, (given.megabytes << 20) // np.dtype(given.dtype).itemsize) ** 2 // 50_000
    ).astype(given.dtype)

    def scan(needles: list[list[int]]) -> int:
        """The number of places, found in blocks as `data seen` finds them."""
        blocks = (tokens[begin : begin + TOKENS_AT_ONCE] for begin in range(0, len(tokens), TOKENS_AT_ONCE))
        return sum(len(places) for block in blocks for places in find_runs(block, needles))

    size = tokens.nbytes / 1e6
    added = size / best(given.rounds, f"adding up {given.dtype}", tokens.view(np.uint64).sum)
    print(f"{size:,.0f} MB of {given.dtype}; adding them up: {added:,.0f} MB/s")
    for count in (1, 20, 100, 1000):
        here = [tokens[at : at + LENGTH].tolist() for at in draw.integers(0, len(tokens) - LENGTH, -(-count // 2))]
        needles = here + [(draw.integers(0, 50_000, LENGTH) ** 2 // 50_000).tolist() for _ in range(count // 2)]
        seconds = best(given.rounds, f"{count} texts, {given.dtype}", lambda needles=needles: scan(needles))
        print(f"{count:5} texts: {size / seconds:,.0f} MB/s")


if __name__ == "__main__":
    main()
