"""The settings of a tuning from the sizes of its data, the model and the machine, each with a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from castalia.config.commented import Settings
from castalia.config.schema import ModelConfig, RunConfig
from castalia.plan.layout import Layout
from castalia.plan.memory import compute_of, memory_by_stage

# Rates for all weights. Adapters bear ten times as much.
RATES = {"causal": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 8e-6, "reward": 1e-5}
RATE_SOURCES = {
    "causal": "as in TRL's SFT",
    "dpo": "as in TRL's DPO: preferences need small steps",
    "kto": "as in TRL's KTO: preferences need small steps",
    "orpo": "as in the paper",
    "reward": "between TRL's rates for adapters and for all weights",
}
ADAPTERS_FACTOR = 10
BATCH, MOST_BATCH = 8, 32
STEPS_WANTED = 100  # in a pass, before the batch grows
MEMORY_SHARE = 0.6  # of what is free
TEXT_LENGTH = 512  # of texts, which follow one another
PACKED_FROM = 1.5  # places of padded samples for each token
WARMUP = 0.03
EVALUATIONS, PATIENCE = 10, 3
LEAST_FOR_PATIENCE = 4  # held-out documents


@dataclass(frozen=True)
class Sizes:
    """Of what is learned: tokens of each document, of the longer side of each pair."""

    documents: np.ndarray  # [documents]
    held_out: int  # documents
    has_labels: bool
    tokens: int  # of all sides


def choose(
    config: RunConfig,
    model: ModelConfig,
    sizes: Sizes,
    memory: int,
    device: str,
    precision: str,
    kind: str,
    processes: int = 1,
) -> Settings:
    """Everything that the data decide, with reasons.

    `config` has the settings that do not depend on them and what the user gave; what the user gave decides the rest.
    `memory` is that of one of the `processes`, which share a batch; `kind` is "LoRA" or "full".
    """
    objective = config.train.objective
    values = rates(objective, kind) | lengths(config, model, sizes)
    length = given(config, values, "data.seq_length")
    packing = packings(config, sizes, length, objective)
    values |= packing
    samples = num_samples(sizes, length, str(given(config, values, "data.packing")))
    values |= batches(samples, len(sizes.documents), objective, processes)
    batch_size = given(config, values, "train.batch_size")
    values |= micro_batches(config, model, length, max(1, batch_size // processes), memory, device, precision)
    values |= durations(config, samples, batch_size, objective)
    steps = given(config, values, "train.steps")
    if WARMUP * steps >= 1:
        values["schedule.warmup"] = (WARMUP, "share of the steps in which the rate rises")
    else:
        values["schedule.warmup"] = (0.0, f"{steps} steps are too few for one")
    return values | evaluations(steps, sizes.held_out)


def given(config: RunConfig, values: Settings, path: str) -> Any:
    """The user's value where there is one, else the chosen one, else the default."""
    if path in config.origins and not config.origins[path].startswith("keys:"):
        return config.at(path)
    return values[path][0] if path in values else config.at(path)


def rates(objective: str, kind: str) -> Settings:
    """The learning rate, by the objective and by what trains."""
    rate, why = RATES[objective], RATE_SOURCES[objective]
    if kind == "LoRA":
        rate, why = rate * ADAPTERS_FACTOR, f"{ADAPTERS_FACTOR} times the rate of all weights ({why})"
    return {
        "optimizer.lr": (float(f"{rate:.2g}"), why),
        "optimizer.weight_decay": (0.0, "few steps from weights that are good already"),
    }


def lengths(config: RunConfig, model: ModelConfig, sizes: Sizes) -> Settings:
    """The length of a sample: of the longest document, as far as the model goes."""
    limit = model.max_positions or int(sizes.documents.max())
    if not sizes.has_labels:
        length = max(1, min(limit, TEXT_LENGTH, int(sizes.documents.sum()) - 1))
        return {"data.seq_length": (length, "tokens; texts follow one another")}
    longest = max(1, int(sizes.documents.max()) - 1)  # the last token is only predicted
    if longest <= limit:
        return {"data.seq_length": (longest, "tokens: nothing is longer")}
    cut = int((sizes.documents - 1 > limit).sum())
    fate, way_out = "cut there", "; data.allow_chopped=false leaves them out"
    if not config.data.allow_chopped:
        fate, way_out = "left out", ""
    why = f"what the model takes: {cut:,} of {len(sizes.documents):,} are longer and {fate}, the longest has "
    return {"data.seq_length": (limit, f"{why}{longest:,}{way_out}")}


def packings(config: RunConfig, sizes: Sizes, length: int, objective: str) -> Settings:
    """Whether several documents share a sample. What is judged stays alone."""
    if not sizes.has_labels:
        return {"data.mask_documents": (True, "texts share samples and do not see each other")}
    clipped = np.minimum(sizes.documents, length + 1)
    waste = length * len(clipped) / max(1, int(clipped.sum()))
    if objective == "causal" and waste > PACKED_FROM and len(clipped) > 2 * BATCH:
        return {
            "data.packing": (
                "pack_until_overflow",
                f"whole documents share samples: alone they would take {waste:.1f} times as many places",
            ),
            "data.mask_documents": (True, "they do not see each other"),
        }
    return {"data.packing": ("unpacked", "a document a sample")}


def num_samples(sizes: Sizes, length: int, packing: str) -> int:
    """Samples of a pass over the data."""
    if packing == "unpacked":
        return len(sizes.documents)
    if packing == "packed":
        return max(1, (int(sizes.documents.sum()) - 1) // length)
    return max(1, math.ceil(_overflowing(sizes.documents, length)))


def _overflowing(documents: np.ndarray, length: int) -> int:
    samples, room = 0, -1  # so that the first document begins a sample, even an empty one
    for size in documents.tolist():
        if size > room:
            samples, room = samples + 1, length + 1  # the last id of a sample is only predicted
        room -= size
    return samples


def batches(samples: int, documents: int, objective: str, processes: int = 1) -> Settings:
    """The batch: for few data small, so that there are steps to take. Each process takes an equal part of it."""
    alone = processes * (2 if objective == "kto" else 1)  # KTO compares the answers of a micro-batch with each other
    size = 2 ** int(math.log2(max(BATCH, min(MOST_BATCH, samples / STEPS_WANTED))))
    per_sample = max(1.0, documents / samples)  # packed documents count by themselves
    size = max(alone, min(samples, round(size / per_sample)))
    size -= size % alone
    return {
        "train.batch_size": (
            size,
            f"of {samples:,} samples" + (" (pairs)" if objective in ("dpo", "orpo", "reward") else ""),
        )
    }


def micro_batches(
    config: RunConfig, model: ModelConfig, length: int, batch_size: int, memory: int, device: str, precision: str
) -> Settings:
    """How much of a process's batch goes through the model at once: as much as there is memory for."""
    plan = config.with_({"data.seq_length": min(length, model.max_positions or length)})
    compute = compute_of(plan, precision, device)
    fitting = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    least = 2 if config.train.objective == "kto" else 1
    for size in reversed(fitting):
        needed = memory_by_stage(model, Layout(micro_batch=size), length, compute)[0].total
        if needed <= MEMORY_SHARE * memory or size == least:
            break
    if size == batch_size:
        return {}
    why = f"at once: {needed / 2**30:.1f} GiB of {memory / 2**30:.1f} that are free"
    return {"train.micro_batch_size": (max(size, least), why)}


def durations(config: RunConfig, samples: int, batch_size: int, objective: str) -> Settings:
    """The number of steps: passes by the number of samples."""
    if given(config, {}, "train.steps"):
        return {}
    epochs = config.train.epochs
    why = f"for {epochs} passes, as you asked"
    if not epochs:
        bounds = (2_000, math.inf) if objective != "causal" else (10_000, 50_000)
        epochs = 3 if samples < bounds[0] else 2 if samples < bounds[1] and objective == "causal" else 1
        why = f"for {epochs} {'passes' if epochs > 1 else 'pass'} over {samples:,} samples (train.epochs)"
    return {"train.steps": (max(1, math.ceil(epochs * samples / batch_size)), why)}


def evaluations(steps: int, held_out: int) -> Settings:
    """When the model is judged, and when it has learned enough."""
    if not held_out:
        return {}
    values: Settings = {
        "eval.every": (
            max(1, steps // EVALUATIONS),
            f"steps by what is held out: {min(steps, EVALUATIONS)} times in all",
        ),
        "eval.batches": (None, "all that is held out"),
    }
    if held_out >= LEAST_FOR_PATIENCE:
        values["eval.patience"] = (
            PATIENCE,
            "evaluations without a lower loss end the run: it begins to learn by heart",
        )
    return values


def sizes_of(lengths: Sequence[np.ndarray], held_out: int, has_labels: bool) -> Sizes:
    """Sizes of documents from those of each side [documents], of which the longer one counts."""
    both = np.maximum.reduce(list(lengths))
    return Sizes(both.astype(np.int64), held_out, has_labels, int(sum(each.sum() for each in lengths)))
