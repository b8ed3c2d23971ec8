"""What the axes of a layout must divide: heads, widths, vocabulary, layers, sequences, micro-batches, ranks.

The only place that knows these rules. `config/check.py` applies them when a config is loaded, `parallel/rank_grid.py`
before ranks are started, `plan/layout.py` to each layout that it considers, and the writers of GPT-NeoX and Megatron
checkpoints to the layout that they write for.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt, lcm
from typing import NamedTuple

from castalia.config.schema import ModelConfig, ParallelConfig


class Problem(NamedTuple):
    """A contradiction between settings."""

    text: str
    paths: tuple[str, ...]  # the settings that are involved


class TensorSplit(NamedTuple):
    """A size of the model that tensor ranks share evenly."""

    setting: str
    parts: str  # what is shared out, in words
    size: int


def tensor_splits(model: ModelConfig) -> list[TensorSplit]:
    """Everything but the vocabulary that `parallel.tp` must divide."""
    # Without num_kv_heads there are as many key/value heads as query heads, and one of the two is enough.
    has_heads = model.attention_layers or "rwkv" in model.layer_kinds
    splits = [TensorSplit("model.num_heads", "heads", model.num_heads)] if has_heads else []
    if model.num_kv_heads and model.attention_layers:
        splits.append(TensorSplit("model.num_kv_heads", "key/value heads", model.num_kv_heads))
    if "dense" in model.layer_kinds:
        splits.append(TensorSplit("model.mlp_size", "columns of the MLP", model.mlp_width))
    if "mamba" in model.layer_kinds:
        splits.append(TensorSplit("model.mamba.width", "channels", model.mamba_width))
    if "rwkv" in model.layer_kinds:
        splits.append(TensorSplit("model.rwkv.width", "columns of the channel mix", model.rwkv_width))
    if model.experts:
        splits.append(TensorSplit("model.experts.count", "experts", model.experts.count))
        if shared := model.experts.shared_width:
            splits.append(TensorSplit("model.experts.shared_width", "columns of the shared expert", shared))
    return splits


def indivisible_splits(model: ModelConfig, tp: int) -> Iterator[TensorSplit]:
    """Those sizes of the model that `tp` ranks cannot share evenly."""
    return (split for split in tensor_splits(model) if split.size % tp)


def tensor_problems(model: ModelConfig, tp: int) -> Iterator[Problem]:
    """What of the model, the vocabulary included where it is known, `tp` ranks cannot share evenly."""
    if tp > 1 and (gated := [kind for kind in model.other_kinds if kind in ("gmlp", "amlp")]):
        text = f"parallel.tp={tp} cannot split {' and '.join(gated)} blocks (model.pattern); use 1"
        yield Problem(text, ("parallel.tp", "model.pattern"))
    for setting, _, size in indivisible_splits(model, tp):
        text = f"parallel.tp={tp} does not divide {setting}={size}; use one of {divisors(size)}"
        yield Problem(text, ("parallel.tp", setting))
    if model.vocab_size and model.padded_vocab_size % tp:
        yield Problem(
            f"parallel.tp={tp} does not divide the vocabulary's {model.padded_vocab_size} rows; "
            f"model.vocab_multiple={lcm(model.vocab_multiple, tp)} fits",
            ("parallel.tp", "model.vocab_multiple"),
        )


def heads_norm_problems(model: ModelConfig, tp: int) -> Iterator[Problem]:
    """Why `tp` ranks cannot train the norms of queries and keys. GPT-NeoX can: its files are read and written so."""
    if tp > 1 and model.attention_layers and model.qk_norm not in (False, "head"):
        why = "has a weight for each head" if model.qk_norm == "each_head" else "is one norm over all heads"
        text = f"model.qk_norm={str(model.qk_norm).lower()} {why}, which parallel.tp={tp} would split; use tp=1"
        yield Problem(text, ("parallel.tp", "model.qk_norm"))


def expert_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Why data ranks cannot share out the experts."""
    ranks, paths = parallel.expert, ("parallel.expert", "model.experts.count")
    if ranks == 1:
        return
    if model.experts is None:
        yield Problem(f"parallel.expert={ranks} shares out experts, of which the model has none; remove it", paths)
    elif model.experts.count % ranks:
        count = model.experts.count
        text = f"parallel.expert={ranks} does not divide model.experts.count={count}; use one of {divisors(count)}"
        yield Problem(text, paths)
    if parallel.tp > 1:
        text = f"parallel.expert={ranks} and parallel.tp={parallel.tp} would both share out the experts; set one to 1"
        yield Problem(text, ("parallel.expert", "parallel.tp"))
    if parallel.pp > 1 and parallel.pipeline == "zero-bubble":
        yield Problem(
            f"parallel.expert={ranks}: tokens cannot travel back in the halves of a backward pass, as "
            "parallel.pipeline=zero-bubble computes it; use 1f1b or interleaved",
            ("parallel.expert", "parallel.pipeline"),
        )


def stages_per_rank(parallel: ParallelConfig) -> int:
    """Pipeline stages on each pipeline rank."""
    if parallel.pp == 1:
        return 1
    return parallel.stages_per_rank or (2 if parallel.pipeline in ("interleaved", "zero-bubble") else 1)


def pipeline_problems(model: ModelConfig, pp: int, stages_per_rank: int = 1) -> Iterator[Problem]:
    """Why the model's layers are too few for this many stages, each of which needs one."""
    if pp * stages_per_rank > model.num_layers:
        stages = f" x {stages_per_rank} stages" if stages_per_rank > 1 else ""
        yield Problem(
            f"parallel.pp={pp}{stages} is more than model.num_layers={model.num_layers}: a stage needs a layer; "
            f"use parallel.pp <= {max(1, model.num_layers // stages_per_rank)}",
            ("parallel.pp", "model.num_layers"),
        )


def sequence_problems(parallel: ParallelConfig, seq_length: int) -> Iterator[Problem]:
    """Why context ranks, and tensor ranks that split activations by sequence, cannot share a sequence evenly."""
    ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    if seq_length % ranks:
        yield Problem(
            f"data.seq_length={seq_length} does not split over {ranks} context and sequence-parallel ranks; "
            f"use {-(-seq_length // ranks) * ranks}",
            ("data.seq_length", "parallel.cp", "parallel.sequence_parallel", "parallel.tp"),
        )


def ulysses_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Why context ranks cannot share a tensor rank's heads evenly, which Ulysses attention needs."""
    heads = model.num_heads // parallel.tp
    if parallel.cp_kind == "ulysses" and heads % parallel.cp:
        yield Problem(
            f"parallel.cp_kind=ulysses gives each of parallel.cp={parallel.cp} ranks whole heads, but there are "
            f"{heads} on each tensor rank; use one of {divisors(heads)}, or parallel.cp_kind=gather",
            ("parallel.cp_kind", "parallel.cp", "model.num_heads"),
        )


def micro_batch_problems(parallel: ParallelConfig, accumulation: int) -> Iterator[Problem]:
    """Why the pipeline's schedule cannot take `accumulation` micro-batches in a step."""
    paths = ("train.accumulation", "parallel.pipeline", "parallel.pp")
    if parallel.pp == 1:
        return
    if parallel.pipeline == "interleaved" and accumulation % parallel.pp:
        fits = " or ".join(map(str, multiples(accumulation, parallel.pp)))
        yield Problem(
            f"train.accumulation={accumulation} micro-batches do not suit parallel.pipeline=interleaved, which takes "
            f"multiples of parallel.pp={parallel.pp}; use {fits}",
            paths,
        )
    if parallel.pipeline == "zero-bubble" and accumulation < 2 * parallel.pp:
        yield Problem(
            f"train.accumulation={accumulation} micro-batches are too few for parallel.pipeline=zero-bubble on "
            f"parallel.pp={parallel.pp}; use at least {2 * parallel.pp}",
            paths,
        )


def multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` on both sides of a number that is not one itself; none is 0."""
    return sorted({max(1, number // unit) * unit, (number // unit + 1) * unit})


def divisors(number: int) -> str:
    """The divisors of a number for a message, the smallest 24 of them if there are more."""
    # Divisors come in pairs around the root; the bound keeps giant numbers from taking seconds.
    low = [n for n in range(1, min(isqrt(number), 10_000) + 1) if number % n == 0]
    return ", ".join(str(n) for n in sorted({*low, *(number // n for n in low)})[:24])
