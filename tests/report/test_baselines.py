import gzip
import lzma

import numpy as np
import pytest

from castalia.report.baselines import byte_entropy, gzip_bits, token_unigram_bits, xz_bits


def test_the_entropy_of_known_texts():
    assert byte_entropy(b"aaaa") == 0
    assert byte_entropy(b"abab") == 1
    assert byte_entropy(b"aaab") == pytest.approx(0.8112781)  # -(3/4 log2 3/4 + 1/4 log2 1/4)
    assert byte_entropy(bytes(range(256))) == 8


def test_the_unigram_of_tokens_counts_each_once_more():
    counts = np.array([2, 0, 1])  # with one more each 3, 1 and 2 of 6
    assert token_unigram_bits(np.array([0, 0]), counts) == pytest.approx(2)
    assert token_unigram_bits(np.array([1, 2]), counts) == pytest.approx(np.log2(6) + np.log2(3))


def test_compressed_sizes_are_those_of_the_compressors():
    text = b"in the beginning " * 50
    assert gzip_bits(text) == 8 * len(gzip.compress(text, 9))
    assert xz_bits(text) < 8 * len(text) / 5
    assert lzma.decompress(lzma.compress(text)) == text
