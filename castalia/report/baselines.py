"""What a byte of a text takes without a language model: by frequencies alone, and by common compressors."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def byte_entropy(text: bytes) -> float:
    """Bits a byte by the text's own frequencies of bytes: no coder that knows frequencies alone does better."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # a text of one byte: 0 without its sign


def token_unigram_bits(tokens: np.ndarray, counts: np.ndarray) -> float:
    """Bits of all `tokens` [n] by their frequencies in other text; `counts` [vocabulary], each of them plus one."""
    return float(-np.log2((counts[tokens] + 1) / (counts.sum() + len(counts))).sum())


def gzip_bits(text: bytes) -> int:
    """Of `gzip -9`."""
    return 8 * len(gzip.compress(text, 9, mtime=0))


def xz_bits(text: bytes) -> int:
    """Of `xz -9e`."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
