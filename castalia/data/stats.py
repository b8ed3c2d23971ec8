"""What a corpus holds, in figures."""

from __future__ import annotations

from typing import Any

import numpy as np

from castalia.data.indexed import IndexedDataset

BLOCK = 1 << 24


def describe(data: IndexedDataset) -> dict[str, Any]:
    """Counts, dtype, largest id and a histogram of lengths whose bins are powers of two."""
    sizes = data.sizes
    counts = np.bincount(np.frexp(sizes)[1])  # bin k: lengths 2^(k-1) to 2^k - 1
    return {
        "prefix": data.prefix,
        "documents": max(0, len(data.doc_index) - 1),
        "items": len(data),
        "tokens": int(sizes.sum(dtype=np.int64)),
        "dtype": data.dtype.name,
        "bytes": data.tokens.nbytes,
        "largest_id": largest_id(data),
        "shortest": int(sizes.min()) if len(data) else 0,
        "longest": int(sizes.max()) if len(data) else 0,
        "lengths": [
            {"from": 1 << k >> 1, "to": max(0, (1 << k) - 1), "documents": int(count)}
            for k, count in enumerate(counts)
            if count
        ],
    }


def largest_id(data: IndexedDataset) -> int | None:
    blocks = range(0, len(data.tokens), BLOCK)
    return max((int(data.tokens[first : first + BLOCK].max()) for first in blocks), default=None)
