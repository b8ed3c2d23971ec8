"""Judge a model outside of training: a run on its own validation data, or any model on a file of records.

The figures of a run are those that its training gives with eval.batches=null: by its labels, and by its objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import batch_plan
from castalia.config.objective import PAIRED, needs_reference
from castalia.config.schema import PreferenceConfig, RunConfig
from castalia.data.loader import Batch, Samples
from castalia.data.pairs import open_samples
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CastaliaError, ConfigError, DataError
from castalia.evaluate.perplexity import bits_per_byte, evaluate
from castalia.evaluate.record_batches import (
    Record,
    answers_encoder,
    kind_of_file,
    on_all_tokens,
    read_records,
    record_batches,
    rewards_encoder,
    template_note,
    within,
)
from castalia.evaluate.token_stream import validation_stream
from castalia.parallel.executor import Executor, Rows
from castalia.parallel.rendezvous import world_size
from castalia.train.preference import PreferenceLoss

Tell = Callable[[Sequence[str], str], None]  # notes, and what they are about


def judge_by_labels(
    checkpoint: Checkpoint,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    data: str | None,
    load: Callable[[Checkpoint], Executor],
    tell: Tell,
    *,
    on: str | None = None,
    template: Path | None = None,
    of_streams: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The figures by labels and preferences, of a run's own validation data or of a file of records.

    None where the data are a stream of text. `load` makes the model, and the reference model where there is one. `on`:
    "all" for the loss on questions, too. `of_streams`: options that were given and that only a stream has a use for.
    Raises ConfigError for options that do not act, DataError for records that do not fit the model.
    """
    kind = kind_of_file(data) if data and Path(data).is_file() else "text"
    own = data is None and has_own_figures(config) and not of_streams
    if kind == "text" and not own:
        if on or template:
            raise ConfigError(
                f"{'--on' if on else '--chat-template'} is for data with answers; here every token counts"
            )
        return None
    if of_streams:
        raise ConfigError(
            f"{data} holds answers, each judged by itself: {' and '.join(of_streams)} is for streams of text"
        )
    config = config.with_({"train.objective": "reward"}) if architecture(checkpoint).reward_head else config
    if world_size() > 1 and (kind in ("pair", "judged") or own and config.train.objective != "causal"):
        raise ConfigError("preferences are judged by one process: leave --tp, --pp and --nproc out")
    source, note = reference_checkpoint(config, stored=own)
    if note:
        tell([note], checkpoint.path)
    executor = load(checkpoint)
    reference = load(source) if source else None
    if own:
        figures: dict[str, Any] = judge_by_own_validation(config, executor, reference, on == "all")
        if config.train.objective == "causal" and not any(source.labels for source in config.data.valid):
            figures |= _text_bits(config, tokenizer, figures)
        return {"data": ", ".join(each.path for each in config.data.valid), **figures}
    assert data is not None
    if tokenizer is None:
        raise DataError(f"{data} is text, but the checkpoint names no tokenizer; give one with --tokenizer")
    encoder = rewards_encoder if executor.models[0].cfg.reward_head else answers_encoder
    records = read_records(data, encoder(tokenizer, template))
    if strings := template_note(records, tokenizer, template):
        tell([strings], data)
    return {"data": data, **judge_records(records, config, executor, reference, data, tell, on == "all")}


def _text_bits(config: RunConfig, tokenizer: Tokenizer | None, figures: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of texts, all of whose tokens count; empty without a tokenizer."""
    size = validation_stream(config.data, tokenizer).num_bytes
    return {"bits_per_byte": bits_per_byte(figures["loss"], int(figures["tokens"]), size)} if size else {}


def judge_records(
    records: Sequence[Record],
    config: RunConfig,
    executor: Executor,
    reference: Executor | None,
    file: str,
    tell: Tell,
    on_all: bool = False,
) -> dict[str, Any]:
    """The figures of the records of a file. Raises DataError where the model has no use for their kind."""
    cfg = executor.models[0].cfg
    length = cfg.max_positions or max(len(d.ids) for record in records for d in record.documents)
    kept = usable(records, length)
    if len(kept) < len(records):
        left_out = len(records) - len(kept)
        tell([f"{left_out} of {len(records)} records are left out: no answer within {length} tokens"], file)
    kind, sizes = records[0].kind, (config.train.micro_batch_size or 8, length)
    if kind == "answer":
        if cfg.reward_head:
            raise DataError(
                f"{file} holds answers, of which a reward model tells no better one: castalia score rates them"
            )
        figures: dict[str, Any] = judge_answers(kept, executor, *sizes, on_all)
    else:
        judge = judge_pairs if kind == "pair" else judge_judgements
        figures = judge(kept, config, executor, reference, *sizes)
    return {"kind": {"answer": "answers", "pair": "pairs"}.get(kind, kind), "records": len(kept), **figures}


def has_own_figures(config: RunConfig) -> bool:
    """Whether training judges a run by labels, by preferences, or by each document alone, and not by a stream."""
    labelled = any(source.labels or source.rejected for source in config.data.valid)
    return labelled or (config.data.path is None and bool(config.data.valid) and config.eval.batches is None)


def judge_by_own_validation(
    config: RunConfig, executor: Executor, reference: Executor | None, on_all: bool = False
) -> dict[str, float]:
    """What training gives for all validation data; with `on_all` also the loss over all tokens of the texts.

    The model must be that of the run. Raises DataError where nothing is left to judge by.
    """
    samples = open_samples(config.with_({"eval.batches": None}), "valid")
    plan = batch_plan(config)
    if config.train.objective != "causal":
        # KTO compares the sequences of micro-batches, which must be whole ones then.
        multiple = plan.batch_size if config.train.objective == "kto" else 1
        loss = PreferenceLoss(config, executor, reference, plan.accumulation)
        return loss.evaluate(samples.whole_pass(plan.batch_size, multiple))
    assert isinstance(samples, Samples)
    every = replace(samples, has_whole=True).whole_pass(plan.batch_size) if on_all else None
    return _judge_tokens(executor, samples.whole_pass(plan.batch_size), every)


def judge_answers(
    records: Sequence[Record], executor: Executor, rows: int, length: int, on_all: bool = False
) -> dict[str, float]:
    """The loss on the answers of records; with `on_all` also the loss over all of their tokens."""
    every = record_batches(records, rows, length, has_whole=True) if on_all else None
    return _judge_tokens(executor, record_batches(records, rows, length), every)


def _judge_tokens(executor: Executor, batches: Iterator[Batch], every: Iterator[Batch] | None) -> dict[str, float]:
    """The loss by labels, and that over all tokens of the same batches with `whole`, where they are given."""
    figures = evaluate(executor, batches)
    if not figures["tokens"]:
        raise DataError("nothing is left to judge by: no label lies within the model's length (data.seq_length)")
    if every is not None:
        on_all = evaluate(executor, map(on_all_tokens, every))
        figures |= {f"{name}_on_all": value for name, value in on_all.items()}
    return figures


def judge_pairs(
    records: Sequence[Record], config: RunConfig, executor: Executor, reference: Executor | None, rows: int, length: int
) -> dict[str, float]:
    """Accuracy and margin on pairs, by the run's objective where that learns from pairs, with its loss.

    A model of another kind is judged by log-probabilities: relative to the reference model if there is one.
    """
    objective, preference = config.train.objective, config.preference
    if objective not in PAIRED and reference is None:
        preference = PreferenceConfig(beta=1.0, reference_free=True)
    elif objective == "dpo" and reference is None:
        preference = preference.with_({"reference_free": True})
    judged = config.with_({"train.objective": objective if objective in PAIRED else "dpo", "preference": preference})
    batches = record_batches(records, rows, length, has_whole=objective == "orpo")
    figures = PreferenceLoss(judged, executor, reference, 1).evaluate(batches)
    return {name: value for name, value in figures.items() if name != "loss" or objective in PAIRED}


def judge_judgements(
    records: Sequence[Record], config: RunConfig, executor: Executor, reference: Executor | None, rows: int, length: int
) -> dict[str, float]:
    """Of wanted and unwanted answers the mean figure of each, and of all their pairs the share in the right order.

    The figure is the reward of a reward model; else the log-probability relative to the reference model, times beta, or
    without one the log-probability of a token of the answer. Raises DataError unless there are answers of both kinds.
    """
    values = sequence_values(record_batches(records, rows, length), config, executor, reference)
    wanted = np.array([record.wanted for record in records])
    if wanted.all() or not wanted.any():
        raise DataError("all answers have the same label: there is no order to judge by")
    return {
        "wanted": float(values[wanted].mean()),
        "unwanted": float(values[~wanted].mean()),
        "accuracy": _share_in_order(values[wanted], values[~wanted]),
    }


def _share_in_order(above: np.ndarray, below: np.ndarray) -> float:
    """The share of pairs (above, below) of which the first is larger; equal ones count half."""
    ordered = np.sort(below)
    smaller = np.searchsorted(ordered, above, "left"), np.searchsorted(ordered, above, "right")
    return float(np.mean([side / len(below) for side in smaller]))


@torch.no_grad()
def sequence_values(
    batches: Iterator[Batch], config: RunConfig, executor: Executor, reference: Executor | None
) -> np.ndarray:
    """The figure of each sequence that `judge_judgements` describes: [sequences], float64."""
    figures = []
    with executor.evaluating():
        for batch in batches:
            values = executor.each_sequence(Rows.of(batch)).cpu().double().numpy()
            if reference is not None:
                with reference.evaluating():
                    values -= reference.each_sequence(Rows.of(batch)).cpu().double().numpy()
                values *= config.preference.beta
            elif not executor.models[0].cfg.reward_head:
                values /= batch.loss_mask.sum(axis=1)
            figures.append(values)
    return np.concatenate(figures)


def usable(records: Sequence[Record], length: int) -> list[Record]:
    """The records that can be judged within a length. Raises DataError if there are none."""
    kept = within(records, length)
    if not kept:
        raise DataError(f"nothing is left to judge by: no label lies within {length} tokens (data.seq_length)")
    return kept


def reference_checkpoint(config: RunConfig, stored: bool) -> tuple[Checkpoint | None, str]:
    """The reference model of a run that has one, and a note where it is not to be found.

    `stored`: its log-probabilities lie beside the data, where they all do. Raises ConfigError if it is needed then.
    """
    if config.train.objective not in ("dpo", "kto") or config.preference.reference_free:
        return None, ""
    if stored and not needs_reference(config):
        return None, ""
    path = config.preference.reference or config.checkpoint.init_from
    try:
        if path:
            return open_checkpoint(path), ""
        reason = "the run does not name it"
    except CastaliaError as error:
        reason = str(error)
    if stored:
        raise ConfigError(f"the reference model of the run is missing: {reason}; name it with preference.reference")
    return None, f"judged without the reference model ({reason}), by log-probabilities alone: preference.reference"
