"""The sequences of one step as plain values: where they come from, their ids, labels and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.loader import Samples
from castalia.data.pairs import Pairs, sides_of
from castalia.data.tokenizer import Tokenizer
from castalia.files import appearing


def batch_rows(samples: Samples | Pairs, number: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """A row for each sequence of the step, counted from 0; of pairs, one for each side. Ready for JSON."""
    sides = sides_of(samples)
    batches = {name: side.batch(number) for name, side in sides.items()}
    return [
        {
            "position": position,
            **({"side": name} if name else {}),
            **({"reward": float(arrays.rewards[row])} if arrays.rewards is not None else {}),
            "pieces": [piece._asdict() for piece in sides[name].pieces(position)],
            "tokens": arrays.tokens[row].tolist(),
            "labels": arrays.labels[row].tolist(),
            "text": tokenizer.decode(arrays.tokens[row]) if tokenizer else None,
        }
        for row, position in enumerate(samples.positions(number).tolist())
        for name, arrays in batches.items()
    ]


def write_ids(samples: Samples | Pairs, number: int, path: Path) -> None:
    """Write the ids of the step, [sequences, tokens + 1], as a NumPy file.

    Inputs and labels are this one array, shifted by one: hence a token more.
    """
    sides, positions = sides_of(samples), samples.positions(number).tolist()
    texts = [side.sample(row)[0][: side.length(number) + 1] for row in positions for side in sides.values()]
    with appearing(path) as file:
        np.save(file, np.stack(texts))
