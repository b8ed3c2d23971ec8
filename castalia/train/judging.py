"""Judge a model outside of training: a run on its own validation data, or any model on a file of records.

The figures of a run are those that its training gives with eval.batches=null: by its labels, and by its objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import batch_plan
from castalia.config.objective import PAIRED, needs_reference
from castalia.config.schema import PreferenceConfig, RunConfig
from castalia.data.loader import Batch, Samples
from castalia.data.pairs import open_samples
from castalia.errors import CastaliaError, ConfigError, DataError
from castalia.evaluate.perplexity import evaluate
from castalia.evaluate.record_batches import Record, on_all_tokens, record_batches, within
from castalia.parallel.executor import Executor, Rows
from castalia.train.preference import PreferenceLoss


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
            values = executor.each_sequence(Rows.of(batch)).double().cpu().numpy()
            if reference is not None:
                with reference.evaluating():
                    values -= reference.each_sequence(Rows.of(batch)).double().cpu().numpy()
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
