"""From a config to everything that a run needs in memory: data, model, optimizer, and what is loaded into them.

`set_up` shows the order: settle the config (`resolve.py`), build the model, load its weights, make optimizer and step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from castalia.bars import Advance, unseen
from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.formats.neox.names import first_rank
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import LoadReport, fill_with_mean, load_optimizer, load_shards
from castalia.checkpoint.restore import architecture as checkpoint_architecture
from castalia.checkpoint.tensors import Checkpoint, Progress, Shard
from castalia.config.batch import BatchPlan
from castalia.config.schema import CompleteConfig, FinetuneConfig, ModelConfig, RunConfig, is_adapter
from castalia.config.tensor_table import row_of
from castalia.data.loader import Batch, Samples
from castalia.data.pairs import Pairs, sides_of
from castalia.data.tokenizer import Tokenizer
from castalia.parallel.compile import fall_back_to_eager
from castalia.parallel.executor import Executor, one_process
from castalia.parallel.process_group import main_first
from castalia.parallel.rendezvous import world_size
from castalia.train.compiling import CompilePlan, with_compiling
from castalia.train.hardware import repeat_bits
from castalia.train.loss_scale import LossScaler
from castalia.train.neox_quirks import NeoXQuirks, quirks_of
from castalia.train.optimizer import DUPLICATE, make_optimizer, rescale_moments
from castalia.train.preference import PreferenceLoss
from castalia.train.recomputing import recomputing_of
from castalia.train.reference_model import needs_reference
from castalia.train.resolve import ResolvedRun, resolve
from castalia.train.schedule import learning_rate, resumed_learning_rate
from castalia.train.step import TrainStep
from castalia.train.trainable import num_added_tokens, start_adapters, trained_names
from castalia.train.update_rules import AnyOptimizer


@dataclass
class Session:
    """A run in memory."""

    config: CompleteConfig
    tokenizer: Tokenizer | None
    plan: BatchPlan
    data: Samples | Pairs
    executor: Executor
    optimizer: AnyOptimizer
    step: TrainStep
    progress: Progress
    dtype: torch.dtype
    compiling: CompilePlan
    quirks: NeoXQuirks
    source: Checkpoint | None = None  # what the weights were loaded from
    loaded: LoadReport | None = None

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.executor.device

    def batch(self, step: int) -> Batch:
        """This data rank's part of the batch of a step (from 0)."""
        return self.data.batch(step, self.plan_at(step).rows_of(self.executor.data_rank))

    def plan_at(self, step: int) -> BatchPlan:
        """The batch of a step (from 0), which is smaller while the batch size warms up."""
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
        """Whether the run continues from a checkpoint's step, instead of beginning anew from its weights."""
        return self.source is not None and self.config.checkpoint.init_from is None


def start(config: RunConfig) -> Session:
    """Reads, builds and loads, and writes index files alone. Called on all ranks together.

    Raises a CastaliaError for whatever is missing or does not fit together.
    """
    session = set_up(config)
    build_index(session)
    return session


def build_index(session: Session, advance: Advance = unseen) -> None:
    """Builds or reads the index of a run's samples, which takes long for a large corpus or many passes over it."""
    with main_first():  # it builds the files that the other ranks then find
        session.data.build_index(advance)


def set_up(config: RunConfig) -> Session:
    """As `start`, but without the index of the samples, which is built by `build_index` or with the first batch."""
    if config.train.deterministic:
        repeat_bits()  # before the first kernel
    run = resolve(config)
    executor = build_model(run)
    loaded = load_weights(executor, run)
    return make_session(run, executor, loaded)


def build_model(run: ResolvedRun) -> Executor:
    """The model of a run on this rank, its parameters still unset."""
    return make_executor(with_compiling(run.config, run.compiling), run.dtype, run.device, run.plan)


def load_weights(executor: Executor, run: ResolvedRun) -> LoadReport | None:
    """Gives the parameters their first values: the checkpoint's, or random ones (None is returned then)."""
    config, source = run.config, run.source
    report = load_parameters(executor, config.model, source, num_added_tokens(config, source)) if source else None
    start_adapters(executor, config, source)
    if source is None:
        executor.initialize(config)
    return report


def load_optimizer_state(optimizer: AnyOptimizer, executor: Executor, run: ResolvedRun, quirks: NeoXQuirks) -> None:
    """Gives the optimizer the moments of the checkpoint that a run resumes, where there is one."""
    if run.resumed is None or not run.config.checkpoint.load_optimizer:
        return
    for parameters in (executor.parameters, executor.duplicates):
        load_optimizer(optimizer, parameters, run.resumed, run.config.model.vocab_size, rank_shard(executor))
    if quirks.adam_steps_ahead:
        for state in optimizer.state.values():
            state["step"] += quirks.adam_steps_ahead
    rescale_moments(optimizer, run.resumed.summed_micro_batches, quirks.gradient_factor)


def make_session(run: ResolvedRun, executor: Executor, loaded: LoadReport | None) -> Session:
    """The optimizer and the training step of a model whose weights are loaded. The model is put into training mode."""
    config, model = run.config, run.config.model
    progress = run.resumed.progress if run.resumed else Progress()
    quirks = quirks_of(config, run.resumed)
    # A second copy of a tied embedding gets the same gradients; trained alike, both copies stay equal.
    optimizer = make_optimizer(
        executor.parameters | {f"{DUPLICATE}{name}": p for name, p in executor.duplicates.items()},
        config.optimizer,
        summed_bias_ranks=quirks.summed_bias_ranks,
        width_multiplier=model.width_multiplier,
        num_layers=model.num_layers,
        elsewhere=trained_names(config),
    )
    load_optimizer_state(optimizer, executor, run, quirks)
    rate = learning_rate(config, config.steps, quirks.release)
    preference = preference_loss(run, executor)
    step = TrainStep(
        executor,
        optimizer,
        resumed_learning_rate(rate, progress.schedule, config.checkpoint.schedule_from),
        run.plan,
        seed=config.seed,
        clip_norm=quirks.clip_norm,
        scaler=loss_scaler(config, progress),
        micro_batch_means=config.neox_exact,
        gradient_factor=quirks.gradient_factor,
        skipped=progress.skipped,
        preference=preference,
        batch_warmup=config.train.batch_size_warmup,
        first_compiled=run.compiling.first or 0,
        counted_in_norm=None if quirks.norm_ranks == (1, 1) else first_rank(model, *quirks.norm_ranks),
        balance_rate=model.experts.balance_rate if model.experts else 0.0,
        recomputing=recomputing_of(config, executor, run.plan, run.compiling.first is not None),
    )
    # With `auto` nobody asked for compiling, so a failure to compile must not end the run; with `true` it does.
    if run.compiling.first is not None:
        every = (each.models for each in (executor, preference and preference.reference) if each)
        fall_back_to_eager(every, required=config.train.compile is True)
    for part in executor.models:
        part.train()
    return Session(
        config=config,
        tokenizer=run.tokenizer,
        plan=run.plan,
        data=run.data,
        executor=executor,
        optimizer=optimizer,
        step=step,
        progress=progress,
        dtype=run.dtype,
        compiling=run.compiling,
        quirks=quirks,
        source=run.source,
        loaded=loaded,
    )


def make_executor(
    config: CompleteConfig,
    dtype: torch.dtype,
    device: torch.device,
    plan: BatchPlan,
    frozen: bool = False,
    same_mesh_as: Executor | None = None,
) -> Executor:
    """The model on this process alone, or this process's part of it, its parameters still unset.

    `frozen`: it will not train, so the parameters are held in the compute dtype `dtype` instead of fp32.
    `same_mesh_as`: an executor of the same layout whose process groups serve both, because each takes GPU memory.
    """
    if world_size() == 1:
        return one_process(config, dtype, device, plan, frozen)
    # Imported here because pipelining and sharding take a second to import.
    from castalia.parallel.mesh_executor import MeshExecutor

    mesh = same_mesh_as.mesh if isinstance(same_mesh_as, MeshExecutor) else None
    return MeshExecutor(config, dtype, device, plan, frozen, mesh)


def preference_loss(run: ResolvedRun, executor: Executor) -> PreferenceLoss | None:
    """The objective of a run that learns from preferences, with its frozen reference model where it needs one."""
    config = with_compiling(run.config, run.compiling)
    if config.train.objective == "causal":
        return None
    reference = frozen_reference(config, run, executor) if needs_reference(config) else None
    return PreferenceLoss(config, executor, reference, run.plan.accumulation)


def frozen_reference(config: CompleteConfig, run: ResolvedRun, executor: Executor) -> Executor:
    """The reference model, in the compute dtype and without adapters, on the ranks of `executor`."""
    model = checkpoint_architecture(run.reference) if run.reference else run.config.model
    # The reference is the model before fine-tuning: without adapters, and with nothing that trains.
    plain = config.with_({"finetune": FinetuneConfig(), "model": model})
    reference = make_executor(plain, run.dtype, executor.device, run.plan, frozen=True, same_mesh_as=executor)
    if run.reference:
        load_parameters(reference, model, run.reference)
    else:
        reference.initialize(plain)
    for parameter in reference.parameters.values():
        parameter.requires_grad_(False)
    return reference


def restore(session: Session, path: Path) -> Progress:
    """Restores weights, optimizer and loss scale from a checkpoint of this run, and returns its progress."""
    saved, executor, model = open_checkpoint(path, adapters=True), session.executor, session.config.model
    load_parameters(executor, model, saved)
    for parameters in (executor.parameters, executor.duplicates):
        load_optimizer(session.optimizer, parameters, saved, model.vocab_size, rank_shard(executor))
    if session.step.scaler and saved.progress.loss_scale:
        session.step.scaler.restore(saved.progress.loss_scale)
    return saved.progress


def load_parameters(executor: Executor, model: ModelConfig, source: Checkpoint, added: int = 0) -> LoadReport:
    """Fills this rank's parameters with its slices of the checkpoint. Adapters that the checkpoint lacks stay unset.

    The last `added` rows of the vocabulary are new to the checkpoint: they become the mean of the others.
    """
    shard, lacks_adapters = rank_shard(executor), adapters_of(source) is None
    shards = {n: shard(p) for n, p in executor.parameters.items() if not (is_adapter(n) and lacks_adapters)}
    copies = {name: shard(parameter) for name, parameter in executor.duplicates.items()}
    # One by one and outside of the report, which counts each tensor once.
    for name, parameter in copies.items():
        load_shards({name: parameter}, model, source, added)
    report = load_shards(shards, model, source, added)
    if added:
        assert model.vocab_size is not None
        for name, part in (*shards.items(), *copies.items()):
            if row_of(name).has_token_rows:
                fill_with_mean(part, source.model[name], model.vocab_size - added, model.vocab_size)
    return report


def rank_shard(executor: Executor) -> Callable[[torch.Tensor], Shard]:
    """A function from a tensor to the slice of it that this rank holds, as the checkpoint room reads and writes it."""

    def shard(tensor: torch.Tensor) -> Shard:
        piece = executor.part(tensor)
        return Shard(piece.local, piece.shape, piece.start)

    return shard


def loss_scaler(config: RunConfig, progress: Progress) -> LossScaler | None:
    """The loss scaler of a run in fp16, in the state of `progress`; None for other dtypes."""
    if config.precision.compute != "fp16":
        return None
    scaler = LossScaler(config.precision.loss_scale, config.precision.loss_scale.rule or "stage0")
    if progress.loss_scale:
        scaler.restore(progress.loss_scale)
    return scaler
