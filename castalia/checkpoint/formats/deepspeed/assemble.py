"""Put together what the readers of NeoX and Megatron-DeepSpeed share: optimizer state, progress, facts, notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from castalia.checkpoint.architecture_check import unrounded
from castalia.checkpoint.formats.deepspeed.folder import ScannedFolder, loss_scale
from castalia.checkpoint.rules import STATE_ROLES, Rule, to_ours
from castalia.checkpoint.tensors import AdamState, CheckpointFacts, Progress
from castalia.checkpoint.zero import RankState
from castalia.config.schema import RunConfig
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef

# Stored arguments of the training program from which we take settings of the model: their names -> ours.
ARGUMENTS = {"num_attention_heads": "num_heads", "max_position_embeddings": "max_positions"}


def adam_states(
    rules: Sequence[Rule], ranks: Sequence[RankState] | None, default_step: int, ignore: str
) -> dict[str, AdamState] | None:
    """Our optimizer state from the state of every tensor rank; None where the files have none.

    `default_step`: Adam's step where the files do not store it. `ignore`: see `to_ours`. Raises CheckpointError for
    steps that differ between tensor ranks.
    """
    if ranks is None:
        return None
    tensors = {
        role: to_ours(rules, _by_name(getattr(rank, role) for rank in ranks), role, ignore) for role in STATE_ROLES
    }
    steps = _by_name(rank.step for rank in ranks)
    result: dict[str, AdamState] = {}
    for rule in rules:
        stored = {step for name in rule.theirs.split() for step in steps[name]}
        if len(stored) > 1:
            raise CheckpointError(
                f"the Adam steps of {rule.theirs} differ between tensor ranks: {sorted(stored, key=str)}"
            )
        step = stored.pop()
        for name in rule.ours.split():
            result[name] = AdamState(
                master=tensors["master"][name],
                exp_avg=tensors["exp_avg"][name],
                exp_avg_sq=tensors["exp_avg_sq"][name],
                step=default_step if step is None else step,
            )
    return result


def masters_apart(
    held: Mapping[str, Sequence[TensorRef]], ranks: Sequence[RankState] | None
) -> tuple[tuple[str, ...], str]:
    """The weights, by their names in the files, that are not their fp32 masters rounded, and a note about them."""
    names: dict[str, None] = {}
    for number, rank in enumerate(ranks or ()):
        names |= dict.fromkeys(unrounded({name: refs[number] for name, refs in held.items()}, rank.master))
    if not names:
        return (), ""
    return tuple(names), (
        f"{len(names)} of {len(held)} stored weights are not the fp32 masters rounded ({next(iter(names))} is the "
        "first): either the weights or the masters were changed. Running and converting take the weights, resuming "
        "takes the masters, as DeepSpeed does; without the *_optim_states.pt files there are only the weights"
    )


def progress(folder: ScannedFolder, config: RunConfig | None, fp16: bool) -> Progress:
    """How far the run has come. Tokens are samples times the config's sequence length, 0 if either is unknown."""
    stored = folder.first
    tokens = stored.get("tokens") or (stored.get("global_samples") or 0) * (config.data.seq_length if config else 0)
    schedule = stored.get("lr_scheduler")
    return Progress(
        step=folder.step,
        skipped=stored.get("skipped_steps") or 0,
        tokens=tokens,
        loss_scale=loss_scale(folder) if fp16 else None,
        schedule=schedule if isinstance(schedule, dict) else None,
    )


def layout(folder: ScannedFolder) -> CheckpointFacts:
    """How the files are cut over ranks, and which program cut them."""
    return CheckpointFacts(
        tp=folder.tp,
        pp=folder.pp,
        dp=folder.dp,
        zero=folder.zero_stage,
        version=folder.version,
        optimizer_files=sum(map(len, folder.shards)),
        pipeline_files=bool(folder.layers),
        stored_arguments=tuple(ours for theirs, ours in ARGUMENTS.items() if folder.args.get(theirs)),
    )


def _by_name(ranks: Iterable[Mapping]) -> dict[str, list]:
    ranks = list(ranks)
    return {name: [rank[name] for rank in ranks if name in rank] for rank in ranks[:1] for name in rank}


def whole(value: float) -> float:
    """The value as an integer if it is whole."""
    return int(value) if float(value).is_integer() else value


def weight_dtype(held: Mapping[str, Sequence[TensorRef]]) -> str:
    """The dtype of the stored weights, which DeepSpeed keeps in one dtype."""
    return next(iter(held.values()))[0].dtype_name
