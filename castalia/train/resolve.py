"""From the config that a user wrote to one with nothing left to infer, with the data and checkpoints that it names.

Everything here is decided before a model is built. Called on all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import BatchPlan, batch_plan
from castalia.config.check import refuse_contradictions, require_training
from castalia.config.float8_matrices import activation_type
from castalia.config.schema import CompleteConfig, EarlierBatch, ModelConfig, RunConfig, complete
from castalia.data.loader import Samples
from castalia.data.pairs import Pairs, open_samples
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CheckpointError, ConfigError, TrainingError
from castalia.parallel.process_group import main_first
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.train.compiling import CompilePlan, plan_compiling
from castalia.train.hardware import DTYPES, choose_device, choose_dtype, name_of, require_float8
from castalia.train.reference_model import as_reward_model, needs_reference, with_reference, with_reward_head
from castalia.train.run_facts import refuse_foreign_tokens
from castalia.train.run_folder import holds_checkpoint, refuse_second_start, run_folder
from castalia.train.trainable import what_trains
from castalia.train.vocabulary import open_tokenizer, vocabulary_sizes, with_tokenizer_of

# Properties of the model that a new run may choose differently from the checkpoint that it starts from.
OVERRIDABLE = {"embedding_dropout", "hidden_dropout", "attention_dropout", "init", "init_passes", "init_method"}
OVERRIDABLE |= {"reward_head", "output_init_method", "init_std", "vocab_size", "vocab_multiple", "max_positions"}
OVERRIDABLE |= {"rwkv_over"}

DATA_ORDER = ("data.holdout", "data.shuffled_passes")


@dataclass(frozen=True)
class ResolvedRun:
    """What a run is going to be, before anything is built."""

    config: CompleteConfig  # vocabulary, precision and steps are settled, too
    source: Checkpoint | None  # what the weights come from; None for random ones
    reference: Checkpoint | None  # the reference model of a preference objective, where a checkpoint holds it
    tokenizer: Tokenizer | None
    plan: BatchPlan
    data: Samples | Pairs
    device: torch.device
    dtype: torch.dtype  # that the model computes in
    compiling: CompilePlan

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint whose run continues, with its optimizer state and progress; None where a new run begins."""
        return self.source if self.config.checkpoint.init_from is None else None


def resolve(config: RunConfig) -> ResolvedRun:
    """Settles everything about a run. Raises a CastaliaError for whatever is missing or does not fit together."""
    source = find_source(config)
    inferred, tokenizer = infer_settings(config, source)
    refuse_contradictions(inferred)
    require_training(inferred)
    ranks = world_size()
    plan = batch_plan(inferred, layout(inferred.parallel, ranks).dp if ranks > 1 else 1)
    with main_first():  # which of many documents are held out, it writes into a file
        settled = with_steps(with_earlier_batches(inferred, source, plan.batch_size))
        data = open_samples(settled, "train")
    refuse_other_data(settled, data, source)
    refuse_foreign_tokens(settled)
    reference = open_reference(settled)
    notes = [f"preference.reference: {note}" for note in reference.notes] if reference else []
    device = choose_device(settled.train.device)
    return ResolvedRun(
        config=settled.with_notes(*notes),
        source=as_reward_model(source, settled.model, settled.seed) if source else None,
        reference=reference,
        tokenizer=tokenizer,
        plan=plan,
        data=data,
        device=device,
        dtype=DTYPES[activation_type(settled.precision.compute)],
        compiling=plan_compiling(settled, device, plan.batch_size),
    )


def find_source(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that the run resumes or starts from; None for random weights."""
    wanted = config.checkpoint
    path = wanted.init_from or wanted.resume
    if wanted.starts_if_empty and not holds_checkpoint(run_folder(config)):
        path = wanted.init_from  # of a run that died before its first save
    if path is None:
        return None
    return open_checkpoint(path, step=wanted.step, adapters=True)


def refuse_folder_in_use(config: RunConfig, folder: Path) -> None:
    """Raises TrainingError if a new run would begin in a folder that holds one; CheckpointError, which matters more, if
    the checkpoint that it would begin from is of another model."""
    if config.checkpoint.init_from and holds_checkpoint(folder):
        architecture(config, find_source(config))
    refuse_second_start(folder)


def open_reference(config: RunConfig) -> Checkpoint | None:
    """The checkpoint of the reference model, where the objective needs one and the config names it."""
    path = config.preference.reference
    return open_checkpoint(path) if path and config.train.objective != "causal" and needs_reference(config) else None


def infer_settings(config: RunConfig, source: Checkpoint | None) -> tuple[CompleteConfig, Tokenizer | None]:
    """The config with its model, its precision and what trains filled in, and the tokenizer that it names."""
    # The architecture comes first: training another model than the one meant is the worst of all mistakes.
    model = with_reward_head(architecture(config, source), config, source)
    config = with_data_order_of(with_tokenizer_of(config, source), source)
    finetune = what_trains(config, source, model)
    tokenizer = open_tokenizer(config, finetune)
    sizes = {
        "max_positions": model.max_positions or config.data.seq_length,
        "init": model.init or ("neox" if config.neox_exact else "seeded"),
        **vocabulary_sizes(config, model, source, tokenizer, grows=bool(finetune.add_tokens)),
    }
    compute, device = config.precision.compute, choose_device(config.train.device)
    if compute == "fp8":
        require_float8(device)
    rule = config.precision.loss_scale.rule or ("zero" if config.parallel.zero else "stage0")
    inferred = config.with_(
        {
            "model": model.with_(sizes),
            "precision.compute": "fp8" if compute == "fp8" else name_of(choose_dtype(compute, device)),
            "precision.loss_scale.rule": rule,
            "finetune": finetune,
        }
    )
    notes = left_open(config, model) if source else ()
    return complete(with_reference(inferred, source).with_notes(*notes)), tokenizer


def with_data_order_of(config: RunConfig, source: Checkpoint | None) -> RunConfig:
    """The config of a resumed run that leaves open which documents are held out, and how many passes are shuffled
    together, with what its checkpoint was trained with: other defaults would be other data."""
    if source is None or source.config is None or config.checkpoint.init_from:
        return config
    kept = {path: source.config.at(path) for path in DATA_ORDER if path not in config.origins}
    return config.with_({path: value for path, value in kept.items() if value != config.at(path)})


def with_steps(config: CompleteConfig) -> CompleteConfig:
    """The config with `train.epochs` turned into `train.steps`."""
    if config.train.steps is not None:
        return config
    assert config.train.epochs is not None
    steps = open_samples(config, "train").steps(config.train.epochs)
    if not steps:
        text = f"train.epochs={config.train.epochs}: the data do not fill one step's batch; use a smaller "
        raise ConfigError(f"{text}train.batch_size or data.seq_length, or give train.steps")
    return config.with_({"train.steps": steps, "train.epochs": None})


def with_earlier_batches(config: CompleteConfig, source: Checkpoint | None, batch_size: int) -> CompleteConfig:
    """The config with the batch sizes of the steps that a resumed run has done, where they were others.

    From them follows how many samples were read. GPT-NeoX counts steps alone, so with `neox_exact` the run continues at
    another place in the data.
    """
    spans: list[EarlierBatch] = []
    if source and source.config and source.progress.step and config.checkpoint.init_from is None:
        done, before = source.progress.step, source.config.train
        past = [*before.earlier_batches, EarlierBatch(until=done, batch_size=before.batch_size or 1)]
        spans = [span for span in past if span.until < done]
        last = next(span for span in past if span.until >= done)
        if before.batch_size and last.batch_size != batch_size and not config.neox_exact:
            spans.append(EarlierBatch(until=done, batch_size=last.batch_size))
    return config.with_({"train.earlier_batches": tuple(spans)})


def refuse_other_data(config: RunConfig, data: Samples | Pairs, source: Checkpoint | None) -> None:
    """Raises TrainingError if a resumed run would see other samples than before, unless that is asked for."""
    fingerprint = source.facts.data_fingerprint if source else None
    if not (source and fingerprint) or config.checkpoint.init_from or config.checkpoint.other_data:
        return
    with main_first():  # of what the run has read already, index files are there
        data.build_index()
    if fingerprint == data.fingerprint_until(source.progress.step):
        return
    raise TrainingError(
        f"the data or their order are not those that {source.path} was trained on (another corpus, split, seed or "
        "data.seq_length; another train.steps or train.batch_size too where it changes the number of epochs, which are "
        "shuffled as one; or the corpus came without its PREFIX.sources.json, by which data.holdout=hash knows files). "
        "To continue with them anyway: checkpoint.other_data=true"
    )


def architecture(config: RunConfig, source: Checkpoint | None) -> ModelConfig:
    """The checkpoint's architecture where it has one, with the config's dropout; else the config's.

    Raises CheckpointError where the config states another value than the checkpoint has, ConfigError where neither
    describes a model.
    """
    configured, stored = config.model, source.config.model if source and source.config else None
    if configured is None and stored is None:
        raise ConfigError("the config describes no model: give model.num_layers, hidden_size, num_heads, ...")
    if configured is None or stored is None:
        return configured or stored  # type: ignore[return-value]
    assert source is not None
    stated = {name for name in configured.model_fields_set if config.origins.get(f"model.{name}") != "NeoX default"}
    wanted, actual = _with_derived(configured), _with_derived(stored)
    # `guess`: values that neither the checkpoint's tensors nor its config determine.
    free = OVERRIDABLE | set(source.facts.guesses)
    different = [name for name in wanted if name in stated - free and wanted[name] != actual[name]]
    if different:
        lines = "\n".join(
            f"  model.{name}: {actual[name]} in the checkpoint, {wanted[name]} in the config"
            + (f" ({config.origins[f'model.{name}']})" if f"model.{name}" in config.origins else "")
            for name in different
        )
        raise CheckpointError(
            f"{source.path} is another model than the config describes:\n{lines}\n"
            "Correct these values, or leave them out: the architecture then comes from the checkpoint."
        )
    chosen = (stated & OVERRIDABLE) | (configured.model_fields_set & free - OVERRIDABLE)
    return stored.with_({name: getattr(configured, name) for name in chosen})


def left_open(config: RunConfig, model: ModelConfig) -> tuple[str, ...]:
    """A note on values that the config leaves at their defaults and that the checkpoint's model has otherwise."""
    if config.model is None:
        return ()
    defaults, actual = _with_derived(config.model), _with_derived(model)
    names = defaults.keys() - OVERRIDABLE
    changes = [f"{n}={actual[n]} instead of {defaults[n]}" for n in defaults if n in names and defaults[n] != actual[n]]
    return (f"the checkpoint decides what the config leaves at its default: {', '.join(changes)}",) if changes else ()


def _with_derived(model: ModelConfig) -> dict[str, Any]:
    """All properties of a model, with the sizes that follow from others filled in."""
    return model.model_dump() | {"num_kv_heads": model.kv_heads, "mlp_size": model.mlp_width}
