"""The ranks of a run as a grid: pipeline, data (replicated and sharded), context and tensor ranks.

The rank order is GPT-NeoX's, with the pipeline outermost, where p, d, c, t are a rank's coordinates:
rank = ((p * dp + d) * cp + c) * tp + t.
"""

from __future__ import annotations

from typing import NamedTuple

from castalia.config.batch import batch_plan
from castalia.config.layout_rules import (
    divisors,
    expert_problems,
    heads_norm_problems,
    micro_batch_problems,
    multiples,
    pipeline_problems,
    sequence_problems,
    stages_per_rank,
    tensor_problems,
    ulysses_problems,
)
from castalia.config.schema import CompleteConfig, ModelConfig, ParallelConfig, RunConfig, complete
from castalia.errors import ConfigError


class RankGrid(NamedTuple):
    """Sizes of the grid's axes, outermost first."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    expert: int = 1  # data and context ranks that share out the experts; not an axis beside the others

    @property
    def dp(self) -> int:
        """Data ranks: replicas x shards."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Ranks of the whole grid."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def expert_copies(self) -> tuple[int, int]:
        """Replicas and shards of a rank's experts, over the data and context ranks that `expert` leaves."""
        shards = self.dp_shard * self.cp
        if shards % self.expert == 0:
            return self.dp_replicate, shards // self.expert
        return self.dp_replicate * shards // self.expert, 1

    def __str__(self) -> str:
        sizes = {"PP": self.pp, "DP": self.dp, "CP": self.cp, "TP": self.tp}
        shared = f", experts over {self.expert} ranks" if self.expert > 1 else ""
        return (" x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process") + shared


def layout(parallel: ParallelConfig, world: int) -> RankGrid:
    """The grid that `world` ranks form. Raises ConfigError with the nearest numbers of ranks that fit."""
    model_ranks = parallel.model_ranks
    if world % model_ranks:
        raise ConfigError(
            f"{world} processes cannot hold parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x "
            f"parallel.cp={parallel.cp}: their number must be a multiple of {model_ranks}; "
            f"start {' or '.join(map(str, multiples(world, model_ranks)))}, or change the three"
        )
    dp = world // model_ranks
    # Without ZeRO every data rank is a replica. ZeRO shards over all data ranks unless dp_replicate groups them.
    if parallel.zero == 0:
        return _with_experts(RankGrid(parallel.pp, dp, 1, parallel.cp, parallel.tp), parallel)
    replicate = parallel.dp_replicate or 1
    if dp % replicate:
        raise ConfigError(
            f"parallel.dp_replicate={replicate} does not divide the {dp} data ranks; use one of {divisors(dp)}"
        )
    return _with_experts(RankGrid(parallel.pp, replicate, dp // replicate, parallel.cp, parallel.tp), parallel)


def _with_experts(grid: RankGrid, parallel: ParallelConfig) -> RankGrid:
    """The grid with its expert ranks, which are whole replicas or parts of one. Raises ConfigError."""
    shards, ranks = grid.dp_shard * grid.cp, grid.dp * grid.cp
    if ranks % parallel.expert or (shards % parallel.expert and parallel.expert % shards):
        copies = f", or {shards} times one of {divisors(grid.dp_replicate)}" if grid.dp_replicate > 1 else ""
        raise ConfigError(
            f"parallel.expert={parallel.expert} cannot be taken from {ranks} data and context ranks, of which {shards} "
            f"share one copy of the model; use one of {divisors(shards)}{copies}"
        )
    return grid._replace(expert=parallel.expert)


def check_run(config: RunConfig, world: int) -> None:
    """Raises ConfigError if the run cannot be split over `world` ranks, naming all reasons and what works instead.

    Needs neither tokenizer nor data: what depends on them is checked once the run has them.
    """
    sizes = layout(config.parallel, world)
    problems = _model_problems(complete(config)) if config.model else []
    if config.parallel.cp > 1 and config.data.mask_documents:
        problems.append("data.mask_documents needs whole sequences on each rank; use parallel.cp=1")
    if config.optimizer.name in ("muon", "adafactor"):
        problems.append(
            f"optimizer.name={config.optimizer.name} looks at whole matrices, but several ranks hold parts of them; "
            "use adamw, lion or sgd, or one process"
        )
    if config.train.batch_size or config.train.micro_batch_size:
        accumulation = batch_plan(config, sizes.dp).accumulation
        problems += [problem.text for problem in micro_batch_problems(config.parallel, accumulation)]
    if problems:
        raise ConfigError("\n".join(problems))


def _model_problems(config: CompleteConfig) -> list[str]:
    """Why the model does not split as the config asks."""
    cfg, parallel = config.model, config.parallel
    tp, per_rank = parallel.tp, stages_per_rank(parallel)
    problems = [problem.text for problem in (*tensor_problems(cfg, tp), *expert_problems(cfg, parallel))]
    problems += [problem.text for problem in heads_norm_problems(cfg, tp)]
    if parallel.cp > 1 and parallel.cp_kind != "gather":
        problems += _gather_problems(cfg, parallel)
    problems += [problem.text for problem in pipeline_problems(cfg, parallel.pp, per_rank)]
    # Stages per rank that a schedule allows: one, or several in interleaved, or the two ends of zero-bubble's V.
    least, most = {"interleaved": (2, cfg.num_layers), "zero-bubble": (2, 2)}.get(parallel.pipeline, (1, 1))
    if parallel.pp > 1 and not least <= per_rank <= max(least, most):
        problems.append(
            f"parallel.stages_per_rank={parallel.stages_per_rank} does not suit parallel.pipeline={parallel.pipeline}; "
            f"use {least}"
        )
    if config.train.compile is True and (why := why_not_compiled(config)):
        problems.append(f"train.compile makes one graph of a block, in which {why}; set train.compile=false")
    problems += [problem.text for problem in sequence_problems(parallel, config.data.seq_length)]
    return problems


def why_not_compiled(config: CompleteConfig) -> str | None:
    """What this run needs that a compiled block cannot do; None if nothing stands against compiling."""
    cfg, parallel = config.model, config.parallel
    # Both would break the graph: random numbers that differ between ranks fork the generator's state, and the ring
    # sends and receives in the middle of a block.
    adapters = config.finetune.lora is not None and config.finetune.lora.dropout
    if parallel.tp > 1 and (adapters or cfg.attention_dropout or (parallel.sequence_parallel and cfg.hidden_dropout)):
        return "tensor ranks cannot draw their own dropout"
    if cfg.other_kinds:
        return f"there are {' and '.join(cfg.other_kinds)} blocks (model.pattern)"
    if parallel.cp > 1 and parallel.cp_kind == "ring":
        return "keys and values cannot travel around (parallel.cp_kind=ring)"
    return None


def _gather_problems(cfg: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Why context ranks have to gather keys and values instead of exchanging them by Ulysses or a ring."""
    given = {
        f"model.sliding_window={cfg.window}": cfg.window,
        "model.position=alibi": cfg.position == "alibi",
        f"model.attention_softcap={cfg.attention_softcap}": cfg.attention_softcap,
    }
    problems = [
        f"parallel.cp_kind={parallel.cp_kind} attends to all earlier tokens alike, but {name} does not; use gather"
        for name, wanted in given.items()
        if wanted
    ]
    if parallel.cp_kind == "ring" and cfg.attention_dropout:
        problems.append(
            f"parallel.cp_kind=ring has no model.attention_dropout={cfg.attention_dropout:g}; set it to 0, or use "
            "parallel.cp_kind=gather or ulysses"
        )
    return problems + [problem.text for problem in ulysses_problems(cfg, parallel)]
