"""Loss and bits per byte of every step of a series on the same data. Nothing is converted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.bars import Advance, unseen
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import RunConfig
from castalia.data.split import other_held_out
from castalia.data.tokenizer import Tokenizer
from castalia.evaluate.stream_measure import StreamMeasure, measure_stream
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor
from castalia.series.members import Member
from castalia.series.models import ModelsAhead, digest_of
from castalia.series.resuming import identity_of, work_through
from castalia.train.hardware import choose_device, choose_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure:
    """What all steps are evaluated on, and how."""

    windows: StreamMeasure
    rows: int  # windows in a forward pass
    device: torch.device
    dtype: torch.dtype

    def of(self, model: Transformer) -> dict[str, float | None]:
        """Loss, perplexity, tokens and bits per byte of a model; these are None where they are not known."""
        found = self.windows.figures(Executor(model, self.rows), self.rows)
        return found | {"bits_per_byte": found.get("bits_per_byte")}


def measure_of(checkpoint: Checkpoint, data: str | None, tokenizer: Tokenizer | None) -> Measure:
    """What `castalia eval` computes on this data, which is a corpus or a text file; None: the run's validation data.

    `checkpoint`: one of the series, whose config says how windows are cut and in which precision models compute.
    Raises DataError for data that cannot be read, or of another vocabulary.
    """
    config = checkpoint.config or RunConfig()
    if data is None and (warning := other_held_out(checkpoint.facts.held_out, config.data)):
        log.warning("%s: %s", checkpoint.path, warning)
    device = choose_device(config.train.device)
    return Measure(
        windows=measure_stream(config.data, architecture(checkpoint), data, tokenizer),
        rows=config.train.micro_batch_size or 8,
        device=device,
        dtype=choose_dtype(config.precision.compute, device),
    )


def evaluate_series(
    members: Sequence[Member],
    measure: Measure,
    output: Path | None,
    *,
    jobs: int = 1,
    advance: Advance = unseen,
) -> list[dict[str, Any]]:
    """A row for each step: step, name, digest of the weights, data, loss, perplexity, tokens, bits per byte.

    Steps whose weights are equal are evaluated once. `output`: the table that the caller writes, and after it
    removes the journal; None: there is to be no table. Raises CheckpointError for a step that cannot be loaded.
    """
    known: dict[str, dict[str, Any]] = {}
    parts = {f"{number} {member.name}": number for number, member in enumerate(members)}
    stream, length = measure.windows.stream, measure.windows.length
    content = (len(stream.tokens), int(stream.tokens.astype(np.int64).sum()), length, str(measure.dtype))
    with ModelsAhead(members, measure.device, measure.dtype) as models:

        def work(part: str) -> dict[str, Any]:
            """The row of one step."""
            member, model = members[parts[part]], models.model(parts[part])
            digest = digest_of(model)
            if digest not in known:
                known[digest] = measure.of(model)
            return {
                "step": member.step, "name": member.name, "weights": digest, "data": stream.name, **known[digest],
            }  # fmt: skip

        identity = identity_of(members, "eval", stream.name, content)
        by_part = work_through(list(parts), work, identity, output, jobs=jobs, advance=advance)
    return list(by_part.values())
