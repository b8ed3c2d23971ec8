"""Loss and bits per byte of every step of a series on the same data. Nothing is converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import RunConfig
from castalia.data.tokenizer import Tokenizer
from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
from castalia.evaluate.token_stream import Stream, read_stream, require_known_ids, validation_stream
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor
from castalia.series.members import Member
from castalia.series.models import ModelsAhead, digest_of
from castalia.series.resuming import Advance, identity_of, work_through
from castalia.series.tensor_stats import journal_of
from castalia.train.hardware import choose_device, choose_dtype


@dataclass(frozen=True)
class Measure:
    """What all steps are evaluated on, and how."""

    stream: Stream
    bytes_spelled: int | None  # UTF-8 bytes of the text, if all of its tokens count
    length: int  # tokens of a window
    rows: int  # windows in a forward pass
    by_document: bool  # tokens see only their own document
    ends: tuple[int, ...]  # where windows begin anew
    device: torch.device
    dtype: torch.dtype

    def of(self, model: Transformer) -> dict[str, float | None]:
        """Loss, perplexity, tokens and bits per byte of a model."""
        sizes = self.stream.sizes if self.by_document else None
        batches = windows(self.stream.tokens, self.length, self.length, self.rows, sizes, self.stream.labels, self.ends)
        found: dict[str, float | None] = dict(evaluate(Executor(model, self.rows), batches))
        loss, tokens = found["loss"], found["tokens"]
        bits = None
        if self.bytes_spelled and loss is not None and tokens is not None:
            bits = bits_per_byte(loss, int(tokens), self.bytes_spelled)
        return {**found, "bits_per_byte": bits}


def measure_of(checkpoint: Checkpoint, data: str | None, tokenizer: Tokenizer | None) -> Measure:
    """What `castalia eval` computes on this data, which is a corpus or a text file; None: the run's validation data.

    `checkpoint`: one of the series, whose config says how windows are cut and in which precision models compute.
    Raises DataError for data that cannot be read, or of another vocabulary.
    """
    config = checkpoint.config or RunConfig()
    stream = read_stream(data, tokenizer) if data else validation_stream(config.data, tokenizer)
    model, device = architecture(checkpoint), choose_device(config.train.device)
    require_known_ids(stream, model.padded_vocab_size)
    spelled = stream.num_bytes if stream.labels is None else None
    if config.data.mask_after_eod and tokenizer and tokenizer.eod_id is not None:
        stream = stream.masked_after(tokenizer.eod_id)
    unpacked = config.data.packing == "unpacked" and not data
    return Measure(
        stream=stream,
        bytes_spelled=spelled,
        length=min(config.data.seq_length, model.max_positions or config.data.seq_length),
        rows=config.train.micro_batch_size or 8,
        by_document=config.data.mask_documents,
        ends=tuple(np.cumsum(stream.sizes).tolist()) if unpacked else (),
        device=device,
        dtype=choose_dtype(config.precision.compute, device),
    )


def evaluate_series(
    members: Sequence[Member],
    measure: Measure,
    output: Path,
    *,
    jobs: int = 1,
    begin: Callable[[int], Advance] = lambda total: lambda done, text: None,
) -> list[dict[str, Any]]:
    """A row for each step: step, name, digest of the weights, data, loss, perplexity, tokens, bits per byte.

    Steps whose weights are equal are evaluated once. `output`: the table that the caller writes; the journal beside it
    is the caller's to remove then. Raises CheckpointError for a step that cannot be loaded.
    """
    known: dict[str, dict[str, Any]] = {}
    parts = {f"{number} {member.name}": number for number, member in enumerate(members)}
    stream = measure.stream
    content = (len(stream.tokens), int(stream.tokens.astype(np.int64).sum()), measure.length, str(measure.dtype))
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
        by_part = work_through(list(parts), work, journal_of(output), identity, jobs=jobs, advance=begin(len(members)))
    return list(by_part.values())
