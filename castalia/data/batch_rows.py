"""The sequences of steps as plain values: where they come from, their ids, labels and text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.loader import Samples
from castalia.data.pairs import Pairs, sides_of
from castalia.data.published_rows import ParquetRows, ShardedRows
from castalia.data.sample_index import IGNORE
from castalia.data.tokenizer import Tokenizer
from castalia.files import appearing


def batch_rows(samples: Samples | Pairs, number: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """A row for each sequence of the step, counted from 0; of pairs, one for each side. Ready for JSON."""
    sides = {name: side.at(number) for name, side in sides_of(samples).items()}
    batches = {name: side.batch(number) for name, side in sides.items()}
    return [
        {
            "position": position,
            "epoch": sides[name].epoch(sides[name].first_of(number) + row),
            **({"side": name} if name else {}),
            **({"reward": float(arrays.rewards[row])} if arrays.rewards is not None else {}),
            **({"intervention": change.kind} if (change := sides[name].change(number, row)) else {}),
            "pieces": [piece._asdict() for piece in sides[name].pieces(position)],
            "tokens": arrays.tokens[row].tolist(),
            "labels": arrays.labels[row].tolist(),
            "text": tokenizer.decode(arrays.tokens[row]) if tokenizer else None,
        }
        for row, position in enumerate(samples.positions(number).tolist())
        for name, arrays in batches.items()
    ]


def table_rows(samples: Samples | Pairs, number: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """The rows of a step, counted from 0, as tables of many steps hold them: `ids` are the inputs and one token more.

    `documents` names the parts of documents that a sequence consists of, `loss_tokens` counts the labels of the loss.
    """
    sides, rows = sides_of(samples), batch_rows(samples, number, tokenizer)
    return [
        {
            "step": number + 1,
            "row": row // len(sides),
            "position": facts["position"],
            "epoch": facts["epoch"],
            **{name: facts[name] for name in ("side", "reward") if name in facts},
            **({"intervention": facts.get("intervention")} if _has_interventions(samples) else {}),
            "documents": facts["pieces"],
            "loss_tokens": sum(label != IGNORE for label in facts["labels"]),
            "ids": _ids(sides[facts.get("side", "")], number, row // len(sides)).tolist(),
            "text": facts["text"],
        }
        for row, facts in enumerate(rows)
    ]


def published_rows(
    source: ShardedRows | ParquetRows, steps: range, tokenizer: Tokenizer | None
) -> Iterator[list[dict[str, Any]]]:
    """Blocks of the same rows of published steps (from 0). Which documents they are made of is not published."""
    for block in source.blocks(steps):
        rows = zip(block.steps.tolist(), block.rows.tolist(), pairwise(block.starts.tolist()), strict=True)
        found = []
        for step, row, (start, stop) in rows:
            ids = block.tokens[start:stop].tolist()
            found.append(
                {
                    "step": step + 1,
                    "row": row,
                    "position": step * source.batch_size + row,
                    "epoch": 1,
                    "documents": None,
                    "loss_tokens": len(ids) - 1,
                    "ids": ids,
                    "text": tokenizer.decode(ids) if tokenizer else None,
                }
            )
        yield found


def write_ids(samples: Samples | Pairs, number: int, path: Path) -> None:
    """Write the ids of the step, [sequences, tokens + 1], as a NumPy file.

    Inputs and labels are this one array, shifted by one: hence a token more.
    """
    rows = range(len(samples.positions(number)))
    texts = [_ids(side, number, row) for row in rows for side in sides_of(samples).values()]
    with appearing(path) as file:
        np.save(file, np.stack(texts))


def _has_interventions(samples: Samples | Pairs) -> bool:
    return isinstance(samples, Samples) and samples.interventions is not None


def _ids(side: Samples, number: int, row: int) -> np.ndarray:
    text, labels = side.at(number).sample(int(side.positions(number)[row]))
    if change := side.change(number, row):
        change.apply(text, labels)
    return text[: side.length(number) + 1]
