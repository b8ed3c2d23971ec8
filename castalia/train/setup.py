"""From a config to everything that a run needs in memory: data, model, optimizer, and what was loaded into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.formats.neox.names import first_rank
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import LoadReport, fill_with_mean, load_optimizer, load_shards
from castalia.checkpoint.restore import architecture as checkpoint_architecture
from castalia.checkpoint.tensors import Checkpoint, Progress, Shard
from castalia.config.batch import BatchPlan, batch_plan
from castalia.config.check import refuse_contradictions, require_training
from castalia.config.schema import (
    CompleteConfig,
    EarlierBatch,
    FinetuneConfig,
    ModelConfig,
    RunConfig,
    complete,
    is_adapter,
)
from castalia.config.tensor_table import row_of
from castalia.data.loader import Batch, Samples
from castalia.data.pairs import Pairs, open_samples, sides_of
from castalia.data.tokenizer import Tokenizer, add_tokens, load_tokenizer
from castalia.errors import CheckpointError, ConfigError, TrainingError
from castalia.parallel.compile import allow_eager
from castalia.parallel.executor import Executor, one_process
from castalia.parallel.process_group import main_first
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.train.compiling import Compiling, plan_compiling, settled
from castalia.train.hardware import DTYPES, choose_device, choose_dtype, name_of, repeat_bits
from castalia.train.neox_quirks import NeoXQuirks, quirks_of
from castalia.train.optimizer import DUPLICATE, LossScaler, make_optimizer, rescale_moments
from castalia.train.preference import PreferenceLoss
from castalia.train.reference_model import as_reward_model, needs_reference, with_reference, with_reward_head
from castalia.train.run_facts import refuse_foreign_tokens
from castalia.train.run_folder import holds_checkpoint, run_folder
from castalia.train.schedule import learning_rate, resumed_learning_rate
from castalia.train.step import TrainStep
from castalia.train.trainable import new_tokens, start_adapters, trained_names, what_trains
from castalia.train.update_rules import AnyOptimizer

# What a new run may choose differently from the checkpoint that it starts from.
FREE = {"embedding_dropout", "hidden_dropout", "attention_dropout", "init", "init_passes", "init_method"}
FREE |= {"reward_head", "output_init_method", "init_std", "vocab_size", "vocab_multiple", "max_positions"}


@dataclass
class Session:
    """A run in memory. `config` is complete: vocabulary, precision and steps are settled."""

    config: CompleteConfig
    tokenizer: Tokenizer | None
    plan: BatchPlan
    data: Samples | Pairs
    engine: Executor
    optimizer: AnyOptimizer
    step: TrainStep
    progress: Progress
    dtype: torch.dtype
    compiling: Compiling
    exact: NeoXQuirks
    source: Checkpoint | None = None  # what was loaded
    loaded: LoadReport | None = None

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def batch(self, step: int) -> Batch:
        """This data rank's part of the batch of a step (from 0)."""
        return self.data.batch(step, self.plan_at(step).rows_of(self.engine.data_rank))

    def plan_at(self, step: int) -> BatchPlan:
        return self.plan.at(step, self.config.train.batch_size_warmup)

    @property
    def last(self) -> int:
        """The number of steps of the whole run."""
        return self.config.steps

    def tokens_of(self, step: int) -> int:
        """Tokens of the batch of a step (from 0)."""
        return sum(self.plan_at(step).batch_size * side.length(step) for side in sides_of(self.data).values())

    @property
    def resumed(self) -> bool:
        return self.source is not None and self.config.checkpoint.init_from is None


def start(wanted: RunConfig) -> Session:
    """Reads, builds and loads; writes nothing. Raises a CastaliaError for whatever is missing or does not fit."""
    if wanted.train.deterministic:
        repeat_bits()
    source = find_source(wanted)
    config, tokenizer = resolve(wanted, source)
    refuse_contradictions(config)
    require_training(config)
    ranks = world_size()
    plan = batch_plan(config, layout(config.parallel, ranks).dp if ranks > 1 else 1)
    config = with_steps(with_earlier_batches(config, source, plan.batch_size))
    source = source and as_reward_model(source, config.model, config.seed)
    with main_first():  # it builds the index files that the others then find
        data = open_samples(config, "train")
    refuse_other_data(config, data, source)
    refuse_foreign_tokens(config)
    device = choose_device(config.train.device)
    dtype = DTYPES[config.precision.compute]
    compiling = plan_compiling(config, device, plan.batch_size)
    engine = make_engine(settled(config, compiling), dtype, device, plan)
    resuming = source is not None and config.checkpoint.init_from is None
    loaded = load_engine(engine, config.model, source, new_tokens(config, source)) if source else None
    start_adapters(engine, config, source)
    if source is None:
        engine.initialize(config)
    exact = quirks_of(config, source if resuming else None)
    optimizer = make_optimizer(
        engine.parameters | {f"{DUPLICATE}{name}": p for name, p in engine.duplicates.items()},
        config.optimizer,
        summed_bias_ranks=exact.summed_bias_ranks,
        width_multiplier=config.model.width_multiplier,
        num_layers=config.model.num_layers,
        elsewhere=trained_names(config),
    )
    progress = source.progress if source and resuming else Progress()
    if source and resuming and config.checkpoint.load_optimizer:
        for parameters in (engine.parameters, engine.duplicates):
            load_optimizer(optimizer, parameters, source, config.model.vocab_size, engine_shard(engine))
        if exact.adam_steps_ahead:
            for state in optimizer.state.values():
                state["step"] += exact.adam_steps_ahead
        rescale_moments(optimizer, source.summed_micro_batches, exact.gradient_factor)
    rate = learning_rate(config, config.steps, exact.release)
    reference = open_reference(config)
    step = TrainStep(
        engine,
        optimizer,
        resumed_learning_rate(rate, progress.schedule, config.checkpoint.schedule_from),
        plan,
        seed=config.seed,
        clip_norm=exact.clip_norm,
        scaler=loss_scaler(config, progress),
        micro_batch_means=config.neox_exact,
        gradient_factor=exact.gradient_factor,
        skipped=progress.skipped,
        preference=preference_loss(settled(config, compiling), engine, dtype, plan, reference),
        batch_warmup=config.train.batch_size_warmup,
        first_compiled=compiling.first or 0,
        counted_in_norm=None if exact.norm_ranks == (1, 1) else first_rank(config.model, *exact.norm_ranks),
    )
    if compiling.first is not None and config.train.compile == "auto":
        allow_eager(e.models for e in (engine, step.preference and step.preference.reference) if e)
    for model in engine.models:
        model.train()
    notes = (f"preference.reference: {note}" for note in (reference.notes if reference else ()))
    return Session(
        config=config.with_notes(*notes),
        tokenizer=tokenizer,
        plan=plan,
        data=data,
        engine=engine,
        optimizer=optimizer,
        step=step,
        progress=progress,
        dtype=dtype,
        compiling=compiling,
        exact=exact,
        source=source,
        loaded=loaded,
    )


def make_engine(
    config: CompleteConfig,
    dtype: torch.dtype,
    device: torch.device,
    plan: BatchPlan,
    frozen: bool = False,
    beside: Executor | None = None,
) -> Executor:
    """The model on this process alone, or this process's part of it, its parameters still unset.

    `frozen`: it will not train, so the parameters are held in the compute dtype `dtype` instead of fp32. `beside`: an
    engine of the same layout, whose process groups serve both, because each takes memory on GPUs.
    """
    if world_size() == 1:
        return one_process(config, dtype, device, plan, frozen)
    from castalia.parallel.mesh_executor import (
        MeshExecutor,  # brings in pipelining and sharding, which take a second to import
    )

    return MeshExecutor(config, dtype, device, plan, frozen, beside.mesh if isinstance(beside, MeshExecutor) else None)


def open_reference(config: RunConfig) -> Checkpoint | None:
    """The checkpoint of the reference model, where the objective needs one and the config names it."""
    path = config.preference.reference
    return open_checkpoint(path) if path and config.train.objective != "causal" and needs_reference(config) else None


def preference_loss(
    config: CompleteConfig, engine: Executor, dtype: torch.dtype, plan: BatchPlan, source: Checkpoint | None
) -> PreferenceLoss | None:
    """What a run learns besides predicting tokens, with its reference model, from `source`, where it needs one."""
    if config.train.objective == "causal":
        return None
    reference = None
    if needs_reference(config):
        model = checkpoint_architecture(source) if source else config.model
        plain = config.with_({"finetune": FinetuneConfig(), "model": model})
        reference = make_engine(plain, dtype, engine.device, plan, frozen=True, beside=engine)
        if source:
            load_engine(reference, plain.model, source)
        else:
            reference.initialize(plain)
        for parameter in reference.parameters.values():
            parameter.requires_grad_(False)
    return PreferenceLoss(config, engine, reference, plan.accumulation)


def restore(session: Session, path: Path) -> Progress:
    """Puts weights, optimizer and loss scale back to a checkpoint of this run, and tells how far it was."""
    saved, engine, model = open_checkpoint(path, adapters=True), session.engine, session.config.model
    load_engine(engine, model, saved)
    for parameters in (engine.parameters, engine.duplicates):
        load_optimizer(session.optimizer, parameters, saved, model.vocab_size, engine_shard(engine))
    if session.step.scaler and saved.progress.loss_scale:
        session.step.scaler.restore(saved.progress.loss_scale)
    return saved.progress


def load_engine(engine: Executor, model: ModelConfig, source: Checkpoint, added: int = 0) -> LoadReport:
    """Fills this rank's parameters with its slices of the checkpoint, which may lack adapters.

    The last `added` rows of the vocabulary are new to it: they become the mean of the others.
    """
    shard, lacks_adapters = engine_shard(engine), adapters_of(source) is None
    shards = {n: shard(p) for n, p in engine.parameters.items() if not (is_adapter(n) and lacks_adapters)}
    copies = {name: shard(parameter) for name, parameter in engine.duplicates.items()}
    for name, parameter in copies.items():
        load_shards({name: parameter}, model, source, added)
    report = load_shards(shards, model, source, added)
    if added:
        assert model.vocab_size is not None
        for name, part in (*shards.items(), *copies.items()):
            if row_of(name).has_token_rows:
                fill_with_mean(part, source.model[name], model.vocab_size - added, model.vocab_size)
    return report


def engine_shard(engine: Executor) -> Callable[[torch.Tensor], Shard]:
    """How the checkpoint room sees this rank's tensors."""

    def shard(tensor: torch.Tensor) -> Shard:
        piece = engine.part(tensor)
        return Shard(piece.local, piece.shape, piece.start)

    return shard


def find_source(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to resume or to start from. None for random weights."""
    wanted = config.checkpoint
    path = wanted.init_from or wanted.resume
    if wanted.starts_if_empty and not holds_checkpoint(run_folder(config)):
        path = wanted.init_from  # of a run that died before its first save
    if path is None:
        return None
    return open_checkpoint(path, step=wanted.step, adapters=True)


def resolve(config: RunConfig, source: Checkpoint | None) -> tuple[CompleteConfig, Tokenizer | None]:
    """The config with nothing left to infer, and the tokenizer that it names."""
    model = architecture(config, source)  # first: training another model than meant is the worst of all mistakes
    model = with_reward_head(model, config, source)
    notes = left_open(config, model) if source else ()
    finetune = what_trains(config, source, model)
    named = config.tokenizer.path or config.tokenizer.kind
    tokenizer = load_tokenizer(config.tokenizer, neox=config.neox_exact) if named else None
    if finetune.add_tokens:
        if tokenizer is None:
            raise ConfigError("finetune.add_tokens needs the tokenizer that gets them: give tokenizer.path")
        add_tokens(tokenizer, finetune.add_tokens)
    vocab_size = model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if vocab_size is None:
        raise ConfigError("the vocabulary is unknown: give tokenizer.path, or model.vocab_size without a tokenizer")
    if tokenizer and finetune.add_tokens:
        vocab_size = max(vocab_size, tokenizer.vocab_size)
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size}; "
            "leave model.vocab_size out, or name the tokenizer that belongs to the model"
        )
    foreign = source is not None and source.format != "native" and not (config.model and config.model.vocab_size)
    if foreign and tokenizer and tokenizer.vocab_size < vocab_size:  # such files tell the rows, padding included
        rows = model.padded_vocab_size
        model = model.with_({"vocab_size": tokenizer.vocab_size})
        if model.padded_vocab_size != rows:
            model = model.with_({"vocab_multiple": rows})
        vocab_size = tokenizer.vocab_size
    model = model.with_(
        {
            "vocab_size": vocab_size,
            "max_positions": model.max_positions or config.data.seq_length,
            "init": model.init or ("neox" if config.neox_exact else "seeded"),
        }
    )
    dtype = choose_dtype(config.precision.compute, choose_device(config.train.device))
    rule = config.precision.loss_scale.rule or ("zero" if config.parallel.zero else "stage0")
    config = config.with_(
        {
            "model": model,
            "precision.compute": name_of(dtype),
            "precision.loss_scale.rule": rule,
            "finetune": finetune,
        }
    )
    return complete(with_reference(config, source).with_notes(*notes)), tokenizer


def with_steps(config: CompleteConfig) -> CompleteConfig:
    """Epochs become steps."""
    if config.train.steps is not None:
        return config
    assert config.train.epochs is not None
    steps = open_samples(config, "train").steps(config.train.epochs)
    if not steps:
        text = f"train.epochs={config.train.epochs}: the data do not fill one step's batch; use a smaller "
        raise ConfigError(f"{text}train.batch_size or data.seq_length, or give train.steps")
    return config.with_({"train.steps": steps, "train.epochs": None})


def with_earlier_batches(config: CompleteConfig, source: Checkpoint | None, batch_size: int) -> CompleteConfig:
    """What a resumed run has read so far, if it was in batches of other sizes, becomes part of its config.

    The original counts steps alone, and goes on elsewhere in the data (neox_exact).
    """
    found: list[EarlierBatch] = []
    if source and source.config and source.progress.step and config.checkpoint.init_from is None:
        done, before = source.progress.step, source.config.train
        past = [*before.earlier_batches, EarlierBatch(until=done, batch_size=before.batch_size or 1)]
        found = [span for span in past if span.until < done]
        at = next(span for span in past if span.until >= done)
        if before.batch_size and at.batch_size != batch_size and not config.neox_exact:
            found.append(EarlierBatch(until=done, batch_size=at.batch_size))
    return config.with_({"train.earlier_batches": tuple(found)})


def refuse_other_data(config: RunConfig, data: Samples | Pairs, source: Checkpoint | None) -> None:
    """Raises TrainingError if a resumed run would see other samples than before, unless that is asked for."""
    known = source.facts.data_fingerprint if source else None
    if config.checkpoint.init_from or config.checkpoint.other_data or not known or known == data.fingerprint:
        return
    assert source is not None
    raise TrainingError(
        f"the data or their order are not those that {source.path} was trained on (another corpus, split, seed or "
        "data.seq_length; another train.steps or train.batch_size too where it changes the number of epochs, which are "
        "shuffled as one). To go on with them nevertheless: checkpoint.other_data=true"
    )


def architecture(config: RunConfig, source: Checkpoint | None) -> ModelConfig:
    """The checkpoint's architecture where it has one, with the config's dropout. What the config says must agree."""
    ours, theirs = config.model, source.config.model if source and source.config else None
    if ours is None and theirs is None:
        raise ConfigError("the config describes no model: give model.num_layers, hidden_size, num_heads, ...")
    if ours is None or theirs is None:
        return ours or theirs  # type: ignore[return-value]
    assert source is not None
    given = {name for name in ours.model_fields_set if config.origins.get(f"model.{name}") != "NeoX default"}
    mine, its = _effective(ours), _effective(theirs)
    free = FREE | set(source.facts.guesses)  # neither tensors nor config told
    different = [name for name in mine if name in given - free and mine[name] != its[name]]
    if different:
        lines = "\n".join(
            f"  model.{name}: {its[name]} in the checkpoint, {mine[name]} in the config"
            + (f" ({config.origins[f'model.{name}']})" if f"model.{name}" in config.origins else "")
            for name in different
        )
        raise CheckpointError(
            f"{source.path} is another model than the config describes:\n{lines}\n"
            "Correct these values, or leave them out: the architecture then comes from the checkpoint."
        )
    chosen = (given & FREE) | (ours.model_fields_set & free - FREE)
    return theirs.with_({name: getattr(ours, name) for name in chosen})


def left_open(config: RunConfig, model: ModelConfig) -> tuple[str, ...]:
    """A note on values that the config leaves at a default and that the checkpoint's model has otherwise."""
    if config.model is None:
        return ()
    mine, its = _effective(config.model), _effective(model)
    names = [
        f"{name}={its[name]} instead of {mine[name]}" for name in mine if name not in FREE and mine[name] != its[name]
    ]
    return (f"the checkpoint decides what the config leaves at its default: {', '.join(names)}",) if names else ()


def _effective(model: ModelConfig) -> dict[str, Any]:
    return model.model_dump() | {"num_kv_heads": model.kv_heads, "mlp_size": model.mlp_width}


def loss_scaler(config: RunConfig, progress: Progress) -> LossScaler | None:
    if config.precision.compute != "fp16":
        return None
    scaler = LossScaler(config.precision.loss_scale, config.precision.loss_scale.rule or "stage0")
    if progress.loss_scale:
        scaler.restore(progress.loss_scale)
    return scaler
