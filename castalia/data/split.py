"""Which documents of a corpus are for training, which for validation and which for testing, and whose they are."""

from __future__ import annotations

import numpy as np

from castalia.config.schema import DataConfig
from castalia.data.indexed import IndexedDataset
from castalia.data.sample_index import split_bounds

PARTS = ("train", "valid", "test")


def split_documents(data: DataConfig, text: IndexedDataset) -> dict[str, np.ndarray]:
    """The documents of `data.path`, i32 and in order, by part."""
    bounds = split_bounds(data.split, len(text))
    return {part: np.arange(*bounds[n : n + 2], dtype=np.int32) for n, part in enumerate(PARTS)}


def sources_of(text: IndexedDataset) -> tuple[list[str], np.ndarray] | None:
    """Names of the files that a corpus was made from, and for each document [documents] the number of its file.

    None where the corpus does not tell.
    """
    return None
