"""Which training sequences each step of a series has learnt by heart.

A sequence is k-extractable if greedy decoding after its first tokens, the prompt, gives the k tokens that follow in it.
No decoding is needed to know: as long as it is right, decoding sees the sequence itself, so it is right to the end if
and only if in one pass over the sequence the likeliest token at each place is the one that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from castalia.bars import Advance, unseen
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import LARGEST, RunConfig
from castalia.data.config_corpora import open_data
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.tokenizer import Tokenizer
from castalia.errors import ConfigError, DataError
from castalia.model.transformer import Transformer
from castalia.reading import keys, read_records
from castalia.series.members import Member
from castalia.series.models import ModelsAhead, digest_of
from castalia.series.resuming import identity_of, work_through

ROWS = 32  # sequences in a forward pass
RECORD = keys({"tokens": list[int] | None, "text": str | None, "step": int | None})
WHAT = "--data must be a corpus, the prefix of .bin and .idx"


@dataclass(frozen=True)
class Panel:
    """The sequences that every step is asked about."""

    tokens: np.ndarray  # int64 [sequences, prompt + continuation]
    seen: tuple[int | None, ...]  # the step, from 1, that trains on each; None: none does, or it is unknown
    prompt: int

    @property
    def continuation(self) -> int:
        """Tokens after the prompt."""
        return self.tokens.shape[1] - self.prompt


def panel_of_run(config: RunConfig, steps: Sequence[tuple[int, int]], prompt: int, length: int) -> Panel:
    """The beginnings of the sequences that a run trains on in these ranges of steps, from 1.

    Raises DataError where its data cannot be read, ConfigError for sequences that are shorter.
    """
    samples = open_data(config)
    if length > samples.seq_length:
        raise ConfigError(f"--prompt and --continuation need {length} tokens; sequences have {samples.seq_length}")
    last = config.train.steps or LARGEST
    numbers = [step for first, stop in steps for step in range(max(1, first), min(stop, last) + 1)]
    if not numbers:
        raise ConfigError(f"--steps: the run's steps are 1 to {last} (train.steps)")
    if short := next((step for step in numbers if samples.length(step - 1) < length), None):
        raise ConfigError(
            f"--prompt and --continuation need {length} tokens; step {short} has {samples.length(short - 1)}"
        )
    parts = [samples.batch(step - 1).tokens[:, :length].astype(np.int64) for step in numbers]
    seen = tuple(step for step, part in zip(numbers, parts, strict=True) for _ in part)
    return Panel(np.concatenate(parts), seen, prompt)


def panel_of_corpus(
    prefix: str, steps: Sequence[tuple[int, int]] | None, batch_size: int | None, prompt: int, length: int
) -> Panel:
    """The beginnings of a corpus' documents; of a preshuffled one, whose rows are in the order of training, of `steps`.

    `batch_size`: rows of a step; None: it is unknown which step sees which. Raises DataError for documents that are all
    too short, ConfigError for steps where they are unknown.
    """
    data = open_dataset(prefix)
    rows = range(len(data))
    if steps is not None:
        if batch_size is None or not in_training_order(data):
            raise ConfigError(
                "--steps: which rows of this corpus a step trains on is unknown; it needs a run, or rows of one length "
                "in the order of training and --batch-size"
            )
        spans = [(max(0, first - 1) * batch_size, stop * batch_size) for first, stop in steps]
        chosen = [row for first, stop in spans for row in range(first, min(stop, len(data)))]
    else:
        chosen = [row for row in rows if data.sizes[row] >= length]
    if not chosen or any(data.sizes[row] < length for row in chosen):
        raise DataError(f"{prefix}: its documents do not have {length} tokens (--prompt and --continuation)")
    known = batch_size is not None and in_training_order(data)
    seen = tuple(row // batch_size + 1 if known and batch_size else None for row in chosen)
    return Panel(np.stack([data[row][:length] for row in chosen]).astype(np.int64), seen, prompt)


def in_training_order(data: IndexedDataset) -> bool:
    """Whether all rows have one length, as those of a preshuffled corpus."""
    return len(data) > 1 and int(data.sizes.min()) == int(data.sizes.max())


def panel_of_records(path: Path, tokenizer: Tokenizer | None, prompt: int, length: int) -> Panel:
    """Sequences of a JSONL file: `tokens` or `text`, and `step` for the step that trained on one, if any did.

    Raises DataError for records without either, with fewer tokens than asked for, or for text without a tokenizer.
    """
    rows, seen = [], []
    with open(path, "rb") as file:
        for number, record in enumerate(read_records(file, str(path), RECORD), 1):
            ids = record.get("tokens")
            if ids is None and record.get("text") is not None:
                if tokenizer is None:
                    raise DataError(f"{path} holds text, but the checkpoints name no tokenizer; give --tokenizer")
                ids = tokenizer.encode(record["text"])
            if ids is None or len(ids) < length:
                raise DataError(f"{path}, line {number}: no `tokens` or `text` of at least {length} tokens")
            rows.append(ids[:length])
            seen.append(record.get("step"))
    if not rows:
        raise DataError(f"{path} holds no sequences")
    return Panel(np.array(rows, np.int64), tuple(seen), prompt)


def panel_of(
    checkpoint: Checkpoint,
    data: str | None,
    records: Path | None,
    steps: Sequence[tuple[int, int]] | None,
    batch_size: int | None,
    tokenizer: Tokenizer | None,
    prompt: int,
    length: int,
) -> Panel:
    """The sequences from whatever says which: records, a corpus in the order of training, or the config of the run.

    Raises ConfigError where nothing says, and the errors of the other functions.
    """
    if records is not None:
        return panel_of_records(records, tokenizer, prompt, length)
    config = checkpoint.config
    trained = config is not None and (config.data.path is not None or bool(config.data.train))
    if data is not None:
        if not Path(f"{data}.idx").is_file():
            raise DataError(f"{data}: {WHAT}")
        size = batch_size or (config.train.batch_size if config else None)
        if not trained or steps is None or in_training_order(open_dataset(data)):
            return panel_of_corpus(data, steps, size, prompt, length)
    if config is None or not trained:
        raise ConfigError("nothing says which sequences to ask for: give --data or --panel")
    if steps is None:
        raise ConfigError("--steps A..B: the sequences of which steps of the run to ask for")
    own = config if data is None else config.with_({"data.path": data, "data.train": ()})
    return panel_of_run(own, steps, prompt, length)


@torch.no_grad()
def judge_panel(model: Transformer, panel: Panel, vocabulary: int) -> list[dict[str, Any]]:
    """What a model knows of each sequence: an object for each, in order.

    `vocabulary`: ids below it can be chosen. `nll` is of the continuation in nats, `z` its distance from the mean of
    all sequences in standard deviations; `matching` is the share of places where the likeliest token is the one that
    follows, `reproduced` the share that decoding gives before its first mistake. Raises DataError for unknown ids.
    """
    if int(panel.tokens.max()) >= model.cfg.padded_vocab_size:
        raise DataError(f"the token id {panel.tokens.max()} lies beyond the vocabulary of the checkpoints")
    nll, right = [], []
    for start in range(0, len(panel.tokens), ROWS):
        tokens = torch.from_numpy(panel.tokens[start : start + ROWS]).to(model.device)
        hidden = model.hidden(tokens)[:, panel.prompt - 1 : -1]  # [rows, continuation, h]
        logits, following = model.logits(hidden).float(), tokens[:, panel.prompt :]
        # Padding of the vocabulary is never chosen, but it is a part of the loss, as in training.
        right.append((logits[..., :vocabulary].argmax(-1) == following).cpu().numpy())
        losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        nll.append(losses.view(following.shape).cpu().double().sum(-1).numpy())
    losses_of, matches = np.concatenate(nll), np.concatenate(right)
    spread = float(losses_of.std()) or 1.0
    first_wrong = np.where(matches.all(1), panel.continuation, matches.argmin(1))
    return [
        {
            "row": row,
            "seen_step": panel.seen[row],
            "nll": float(losses_of[row]),
            "z": float((losses_of[row] - losses_of.mean()) / spread),
            "matching": float(matches[row].mean()),
            "reproduced": float(first_wrong[row] / panel.continuation),
            "extractable": bool(matches[row].all()),
        }
        for row in range(len(panel.tokens))
    ]


def memorised(
    members: Sequence[Member],
    panel: Panel,
    output: Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    jobs: int = 1,
    advance: Advance = unseen,
) -> list[dict[str, Any]]:
    """A row for each step and sequence. Steps whose weights are equal are asked once.

    `output` is that of `evaluate_series`. Raises CheckpointError for a step that cannot be loaded.
    """
    known: dict[str, list[dict[str, Any]]] = {}
    parts = {f"{number} {member.name}": number for number, member in enumerate(members)}
    with ModelsAhead(members, device, dtype) as models:

        def work(part: str) -> list[dict[str, Any]]:
            """The rows of one step."""
            member, model = members[parts[part]], models.model(parts[part])
            digest = digest_of(model)
            if digest not in known:
                known[digest] = judge_panel(model, panel, vocabulary)
            return [_row(member, row) for row in known[digest]]

        identity = identity_of(members, "memorise", panel.tokens.tobytes(), panel.seen, panel.prompt, str(dtype))
        by_part = work_through(list(parts), work, identity, output, jobs=jobs, advance=advance)
    return [row for rows in by_part.values() for row in rows]


def _row(member: Member, row: dict[str, Any]) -> dict[str, Any]:
    """A sequence's row with the step, and whether the step has trained on it."""
    seen = row["seen_step"]
    return {"step": member.step, "seen": None if seen is None else seen <= member.step, **row}
