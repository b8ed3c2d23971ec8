"""Token ids as OLMo, Dolma and nanoGPT publish them: a file of ids back to back, without a header, as a corpus.

The bytes are those of our `.bin`, whatever the file is called: only an index is missing, which says where documents
end. It follows from the id that ends each of them; the tokens stay where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from castalia.bars import Advance, unseen
from castalia.data.dataset_writer import write_index
from castalia.data.indexed import IndexedDataset, bin_path, idx_path, open_dataset
from castalia.errors import DataError, refuse_pointer
from castalia.files import appearing

BLOCK_TOKENS = 1 << 22
HEADERS = {  # how files begin that are not ids from the first byte on
    b"\x93NUMPY": "an array of NumPy with a header, where published tokens have none: np.load(FILE).tofile(NEW)",
    (20240520).to_bytes(4, "little"): "a token file of llm.c, whose header of 1,024 bytes has to go: tail -c +1025",
    b"MMIDIDX": "the index of a corpus; name the corpus as it is, in data.path",
}


def token_file_dtype(vocab_size: int) -> str:
    """The dtype that OLMo writes for a vocabulary: the smallest one that holds all ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def index_tokens(
    path: Path, prefix: Path, dtype: str, eod: int, vocab_size: int | None = None, advance: Advance = unseen
) -> IndexedDataset:
    """Make a corpus of a file of ids: `PREFIX.bin`, a link to it, and `PREFIX.idx`. The file is read once.

    `dtype`: uint16 or uint32, little-endian. `eod`: the id that ends each document; what follows the last one is a
    document, too. `advance` gets bytes. Raises DataError for a file with a header, ids beyond the vocabulary, none that
    ends documents, and for a prefix that is taken.
    """
    kind = np.dtype(f"<{np.dtype(dtype).str[1:]}")
    size = _checked_size(path, kind)
    link = bin_path(prefix)
    if os.path.lexists(link) and not (link.exists() and os.path.samefile(link, path)):
        raise DataError(f"{link} exists already, and is not {path}; name another --output")
    index = idx_path(prefix)
    if os.path.lexists(index) and (index.is_symlink() or not link.is_symlink()):  # not one that we made for a link
        raise DataError(f"{index} exists already, so that {prefix} is a corpus as it is; else name another --output")
    tokens = np.memmap(path, kind, mode="r")
    ends = []
    for first in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[first : first + BLOCK_TOKENS]
        if (largest := int(block.max())) >= (vocab_size or 1 << 31):
            raise DataError(
                f"{path}: read as {dtype} it holds the id {largest}, beyond the vocabulary of {vocab_size or 1 << 31}: "
                "give its own tokenizer, or --dtype"
            )
        ends.append(np.flatnonzero(block == eod) + first + 1)
        advance(block.nbytes)
    bounds = np.concatenate(ends)
    if not len(bounds):
        raise DataError(f"{path}: no id {eod}, which would end documents; give its own tokenizer, or --eod and --dtype")
    if bounds[-1] != size // kind.itemsize:
        bounds = np.append(bounds, size // kind.itemsize)
    sizes = np.diff(bounds, prepend=0)
    if int(sizes.max()) >= 1 << 31:
        raise DataError(f"{path}: a document of {int(sizes.max())} tokens; an index holds up to {(1 << 31) - 1}")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(link):
        link.symlink_to(path.resolve())
    with appearing(index) as file:
        # uint32 has no code in an index; as i4 the ids are the same
        write_index(file, np.dtype("<i4") if kind.itemsize == 4 else kind, sizes, np.arange(len(sizes) + 1))
    return open_dataset(prefix)


def _checked_size(path: Path, kind: np.dtype) -> int:
    """The bytes of the file. Raises DataError where it is no file of ids of this dtype."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    refuse_pointer(path, start, DataError)
    if told := next((text for magic, text in HEADERS.items() if start.startswith(magic)), None):
        raise DataError(f"{path} is {told}")
    size = path.stat().st_size
    if not size or size % kind.itemsize:
        raise DataError(f"{path}: {size} bytes are not whole ids of {kind.name}: truncated, or of another --dtype")
    return size
