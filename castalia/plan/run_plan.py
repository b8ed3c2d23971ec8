"""The whole plan of a run as plain values, and warnings about a config before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log, prod
from typing import Protocol

from castalia.config.attention_kernels import AMPERE, Capability
from castalia.config.batch import batch_plan, fitting_batch, steps_within, sum_until, tokens_until
from castalia.config.float8_matrices import refuse_float8
from castalia.config.layout_rules import multiples, stages_per_rank
from castalia.config.objective import PAIRED
from castalia.config.schema import ModelConfig, RunConfig, split_shares
from castalia.config.tensor_table import all_shapes
from castalia.errors import ConfigError
from castalia.plan.count import count, neox_count, non_embedding
from castalia.plan.devices import Device, auto_precision
from castalia.plan.flops import (
    executed_flops,
    kv_cache_bytes,
    neox_flops,
    peak_tokens_per_second,
    state_bytes,
    training_flops,
)
from castalia.plan.host import host_memory, initial_values
from castalia.plan.layout import Layout, problem
from castalia.plan.memory import Compute, Rank, checkpoint_bytes, compute_of, moments_of
from castalia.plan.plan_parts import (
    FlopsPlan,
    KvCache,
    MemoryPlan,
    ModelShape,
    RunPlan,
    SizedPlan,
    StageMemory,
    TimePlan,
    TrainingPlan,
)
from castalia.plan.recompute import again_by_kind, ranks_of
from castalia.plan.run_description import (
    MANY_EPOCHS,
    attention,
    clipping,
    determinism,
    evaluation,
    logging,
    precision,
    saves,
)
from castalia.plan.step_cost import EFFICIENCY, PlanRequest, evaluate_layout
from castalia.units import memory_size

ENOUGH_TOKENS = 20  # per vocabulary entry; with fewer, the largest token id seen says little


@dataclass(frozen=True)
class CorpusFacts:
    """What is known of a corpus."""

    path: str
    tokens: int
    documents: int
    weight: float = 1.0
    largest_id: int | None = None  # among the tokens that were examined
    looked_at: int = 0  # tokens that were examined
    samples: float | None = None  # in a pass, if samples hold whole documents; None: tokens / sequence length


class Rate(Protocol):
    """A learning-rate schedule, such as `LearningRate`: the rate after a number of updates."""

    @property
    def peak(self) -> float:
        """The highest rate."""
        ...

    @property
    def warmup(self) -> float:
        """Warm-up steps, not rounded."""
        ...

    @property
    def end(self) -> int:
        """The step at which the decay ends."""
        ...

    @property
    def style(self) -> str:
        """The shape of the decay, as `schedule.style` names it."""
        ...

    def __call__(self, updates: int) -> float:
        """The learning rate of the update after so many."""
        ...


@dataclass(frozen=True)
class RunFacts:
    """Facts that do not follow from the config. All are optional; missing ones are reported as unknown."""

    corpora: tuple[CorpusFacts, ...] = ()
    rate: Rate | None = None
    kept_checkpoints: int | None = None  # the most that exist at any time of the run
    free_bytes: int | None = None  # on the disk that the run is saved to
    device: str | None = None  # "cpu" or "cuda"
    capability: Capability = AMPERE  # of the GPUs


@dataclass(frozen=True)
class Hardware:
    """The devices that a plan is for."""

    gpus: int
    device: Device
    efficiency: float = EFFICIENCY


def report(
    config: RunConfig, known: RunFacts, hardware: Hardware | None = None, compute: Compute | None = None
) -> RunPlan:
    """Everything that follows from the config, the facts and the devices.

    Raises ConfigError if the config describes no model, or one that the layout cannot divide.
    """
    model, wanted, config = described(config), config.precision.compute, settled(config, hardware)
    compute = compute or default_compute(config, hardware)
    if hardware:
        known = replace(known, device=compute.device, capability=compute.capability)
    config, indivisible = divisible(config, hardware.gpus if hardware else None)
    layout, assumed = layout_of(config, hardware.gpus if hardware else None)
    plan = RunPlan(
        model=_architecture(model),
        non_embedding=non_embedding(model),
        layout=layout,
        training=training(config, known, layout),
        kv_cache=_kv_cache(model, config.data.seq_length, compute),
        warnings=[*indivisible, *warnings(config, known, layout)],
        assumed=assumed,
    )
    if config.precision.compute == "auto":
        assumed.append("precision.compute=auto: bf16; GPUs older than Ampere take fp32, name them (--gpus)")
    if wanted == "auto" and hardware and config.precision.compute == "fp32":
        assumed.append(_without_bf16(hardware.device))
    if model.vocab_size is None:
        plan.unknown.append("the vocabulary, so no totals, memory or times: give --vocab-size N or a tokenizer's file")
        return plan
    if reason := problem(model, layout):
        raise ConfigError(
            f"{reason}; choose another layout, `castalia plan CONFIG --gpus NUMBERxDEVICE --suggest` lists them"
        )
    length, parameters = config.data.seq_length, count(model)
    usable = hardware.device.usable_bytes(layout.communicators) if hardware else None
    ranks = ranks_of(model, layout, length, compute, usable)
    if layout.recompute == "auto" and hardware is None:
        assumed.append("train.recompute=auto: no block is computed again; which ones the devices tell (--gpus)")
    neox_total = neox_count(model, layout.tp, layout.pp)
    sizes = {name: prod(shape) for name, shape in all_shapes(model, config.finetune).items()}
    moments = compute.moments.of(model, config.finetune)
    plan.sized = SizedPlan(
        total=parameters.total,
        active=parameters.active,
        by_kind=parameters.by_kind,
        neox_total=neox_total,
        trained=sum(size for name, size in sizes.items() if config.finetune.trains(name)),
        memory=_memory(ranks, usable),
        host_memory=host_memory(config, model, layout, compute),
        initial_values=initial_values(config, model, layout, compute),
        checkpoint=checkpoint_bytes(sum(sizes.values()), moments, neox_total, not compute.casts),
        flops=FlopsPlan(
            per_token=training_flops(model, length),
            executed_per_token=executed_flops(
                model, length, layout.recompute, [n for rank in ranks for n in rank.again]
            ),
            neox_per_token=neox_flops(model, length),
        ),
        time=_time(plan.training, job_of(config, hardware, layout.batch, compute), layout) if hardware else None,
    )
    plan.unknown += _unknown(plan, known, hardware)
    return plan


def described(config: RunConfig) -> ModelConfig:
    """The architecture, with positions as long as the sequence and a head that suits the objective."""
    if config.model is None:
        raise ConfigError("this config describes no model; name a file or preset that gives model.num_layers first")
    positions, reward = config.model.max_positions or config.data.seq_length, config.train.objective == "reward"
    return config.model.with_({"max_positions": positions, "reward_head": reward})


def settled(config: RunConfig, hardware: Hardware | None) -> RunConfig:
    """The config with precision.compute=auto replaced by its value on the devices, if they are known."""
    wanted = config.precision.compute
    if hardware and hardware.device.capability and wanted == "fp8":
        refuse_float8(hardware.device.name, hardware.device.capability)
    if hardware is None or wanted != "auto":
        return config
    return config.with_({"precision.compute": auto_precision(hardware.device.bf16)})


def _without_bf16(device: Device) -> str:
    faster = f"; fp16 multiplies at {device.tflops:g} TFLOP/s instead of {device.fp32_tflops:g}"
    return f"precision.compute=auto: fp32, because {device.name} has no bf16" + (faster if device.name != "cpu" else "")


def default_compute(config: RunConfig, hardware: Hardware | None) -> Compute:
    """What the run computes in on the devices; without any, on GPUs of the Ampere generation."""
    capability = hardware.device.capability if hardware else AMPERE
    precision = settled(config, hardware).precision.compute
    device = "cpu" if capability is None else "cuda"
    return compute_of(config, "bf16" if precision == "auto" else precision, device, capability or AMPERE)


def divisible(config: RunConfig, gpus: int | None) -> tuple[RunConfig, list[str]]:
    """The config with the nearest batch that divides over the devices, and a warning if that is not its own."""
    train, dp = config.train, _data_ranks(config, gpus)
    if train.batch_size is None and (train.micro_batch_size is None or config.parallel.gpus is None):
        return config, []
    try:
        batch_plan(config, dp)
    except ConfigError as error:
        fitting = fitting_batch(config, dp)
        batch_plan(fitting, dp)
        return fitting, [f"{error}. So the run does not start; this plan has {fitting.train.batch_size} sequences"]
    return config, []


def _data_ranks(config: RunConfig, gpus: int | None) -> int:
    parallel = config.parallel
    copy = parallel.model_ranks
    gpus = gpus or parallel.gpus or copy * _implied_data_ranks(config)
    if gpus % copy:
        raise ConfigError(
            f"{gpus} devices do not divide into tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {copy}; "
            f"{' or '.join(map(str, multiples(gpus, copy)))} would"
        )
    return gpus // copy


def layout_of(config: RunConfig, gpus: int | None) -> tuple[Layout, list[str]]:
    """The config's layout on `gpus` devices (None: its own), and what had to be assumed."""
    parallel, assumed, dp = config.parallel, [], _data_ranks(config, gpus)
    if config.train.batch_size is None and config.train.micro_batch_size is None:
        micro, accumulation = 1, config.train.accumulation or 1
        assumed.append("train.micro_batch_size is not given: 1 sequence for each data-parallel rank")
    else:
        if config.train.batch_size is None and parallel.gpus is None:  # the batch follows from the devices
            config = config.with_({"parallel.gpus": dp * parallel.model_ranks})
        _, micro, accumulation = batch_plan(config, dp)
    return (
        Layout(
            tp=parallel.tp,
            pp=parallel.pp,
            cp=parallel.cp,
            dp=dp,
            dp_replicate=parallel.dp_replicate or 1,
            zero=parallel.zero,
            sequence_parallel=parallel.sequence_parallel,
            micro_batch=micro,
            accumulation=accumulation,
            recompute=config.train.recompute,
            pipeline=parallel.pipeline,
            stages_per_rank=stages_per_rank(parallel),
            offload=parallel.offload,
            cp_kind=parallel.cp_kind,
            expert=parallel.expert,
        ),
        assumed,
    )


def _implied_data_ranks(config: RunConfig) -> int:
    """Data-parallel ranks that batch size, micro-batch size and accumulation imply; 1 if any of them is missing."""
    train = config.train
    if train.batch_size and train.micro_batch_size and train.accumulation:
        return max(1, train.batch_size // (train.micro_batch_size * train.accumulation))
    return 1


def training(config: RunConfig, known: RunFacts, layout: Layout) -> TrainingPlan:
    """The run in figures: batch, tokens, epochs, schedule, checkpoints. None for what is unknown."""
    paired = config.train.objective in PAIRED
    one_side = layout.batch * config.data.seq_length
    tokens_per_step = 2 * one_side if paired else one_side
    steps = run_steps(config, known, layout)
    end, warmup = decay(config, known, steps)
    return TrainingPlan(
        sequences_per_step=layout.batch,  # or pairs, by "samples"
        samples="pairs x 2" if paired else "sequences",
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        data_ranks=layout.dp,
        seq_length=config.data.seq_length,
        tokens_per_step=tokens_per_step,
        steps=steps,
        rising={
            name: (warmup.start, whole, warmup.steps)
            for name, warmup, whole in (
                ("sequences", config.train.batch_size_warmup, layout.batch),
                ("tokens a sequence", config.data.seq_length_warmup, config.data.seq_length),
            )
            if warmup
        },
        tokens=int(_tokens(config, tokens_per_step, steps)) if steps else None,
        epochs={corpus.path: epochs for corpus, epochs in _epochs(config, known, steps, layout.batch)},
        first_lr=known.rate(0) if known.rate else None,
        peak_lr=known.rate.peak if known.rate else config.optimizer.lr,
        last_lr=known.rate(steps - 1) if known.rate and steps else None,
        style=known.rate.style if known.rate else config.schedule.style,
        decay_end=end,
        warmup_steps=warmup,
        warmup_tokens=_tokens(config, tokens_per_step, warmup) if warmup is not None else None,
        clipping=clipping(config),
        precision=precision(config, known.device),
        attention=attention(config, known.device, known.capability),
        determinism=determinism(config, known.device),
        logged=logging(config),
        evaluated=evaluation(config),
        saved=saves(config),
        checkpoints_kept=known.kept_checkpoints,
        checkpoints_bytes=_run_bytes(config, known),
        free_bytes=known.free_bytes,
        random_loss=_random_loss(config),
    )


def _tokens(config: RunConfig, tokens_per_step: int, steps: float) -> float:
    """Tokens of the first `steps` steps, whose last one may be a fraction."""
    sequences = tokens_per_step // config.data.seq_length
    before, after = (tokens_until(config, sequences, whole) for whole in (int(steps), int(steps) + 1))
    return before + (steps - int(steps)) * (after - before)


def _random_loss(config: RunConfig) -> float | None:
    known = config.train.objective == "causal" and config.model and config.model.vocab_size
    return log(known) if known else None


def run_steps(config: RunConfig, known: RunFacts, layout: Layout) -> int | None:
    """The number of steps, from the config or from its epochs and the corpora; None if unknown."""
    if config.train.steps:
        return config.train.steps
    if config.train.epochs and known.corpora:
        samples = config.train.epochs * sum(_samples_of_a_pass(config, corpus) for corpus in known.corpora)
        return steps_within(config.train.batch_size_warmup, int(samples), layout.batch, config.train.earlier_batches)
    return None


def with_steps(config: RunConfig, known: RunFacts, hardware: Hardware | None) -> RunConfig:
    """The config with the number of steps that its epochs come to, where the corpora tell it."""
    gpus = hardware.gpus if hardware else None
    steps = run_steps(config, known, layout_of(divisible(config, gpus)[0], gpus)[0])
    return config.with_({"train.steps": steps, "train.epochs": None}) if steps else config


def decay(config: RunConfig, known: RunFacts, steps: int | None) -> tuple[int | None, float | None]:
    """The step at which the decay of the learning rate ends, and the steps of the warm-up; None if unknown."""
    if known.rate:
        return known.rate.end, known.rate.warmup
    end = config.schedule.decay_end(steps or 0) or None
    return end, config.schedule.warmup_length(end) if end else None


def warnings(config: RunConfig, known: RunFacts, layout: Layout) -> list[str]:
    """What may surprise, each with a remedy. `castalia train` prints the same before its first step."""
    steps = run_steps(config, known, layout)
    texts = _schedule_warnings(config, known, steps)
    if config.optimizer.clip_norm is None:
        place = config.place("optimizer.clip_norm")
        texts.append(f"{place}gradients are not clipped: one bad batch can undo the run; set optimizer.clip_norm=1.0")
    needed = _run_bytes(config, known)
    if needed and known.free_bytes is not None and needed > known.free_bytes:
        texts.append(
            f"the run's checkpoints need {memory_size(needed)} and {memory_size(known.free_bytes)} are free here; "
            "save less often (checkpoint.every), keep fewer (checkpoint.keep_last) or use another disk (checkpoint.dir)"
        )
    for corpus, epochs in _epochs(config, known, steps, layout.batch):
        if epochs > MANY_EPOCHS:
            texts.append(
                f"{corpus.path} is seen {epochs:.1f} times; more than {MANY_EPOCHS} passes teach little: train for "
                "fewer steps, give it a smaller weight or add data"
            )
    for corpus in known.corpora:
        texts += _corpus_warnings(config, corpus)
    return texts


def _schedule_warnings(config: RunConfig, known: RunFacts, steps: int | None) -> list[str]:
    schedule, (end, warmup) = config.schedule, decay(config, known, steps)
    if not steps or end is None:
        return []
    texts, places = [], config.place("schedule.decay_steps", "schedule.decay_fraction", "train.steps")
    if end < steps and schedule.ends:
        texts.append(
            f"{places}the learning rate's decay ends at step {end:,} of {steps:,}: the last {steps - end:,} steps "
            f"train at {schedule.min_lr:g}; set schedule.decay_steps={steps} to decay over the whole run"
        )
    if end > steps and schedule.ends:
        last = f", at {known.rate(steps - 1):.3g} instead of {schedule.min_lr:g}" if known.rate else ""
        texts.append(
            f"{places}the run stops at step {steps:,}, before its learning rate has decayed (step {end:,}){last}; "
            f"set schedule.decay_steps={steps}, or null"
        )
    if warmup and warmup < 1:
        texts.append(
            f"{config.place('schedule.warmup')}the warm-up is shorter than a step ({warmup:g} of {end:,} steps), so "
            "there is none; "
            f"set schedule.warmup={1 / end:.2g} or more, or 0"
        )
    return texts


def _corpus_warnings(config: RunConfig, corpus: CorpusFacts) -> list[str]:
    texts, vocabulary = [], config.model.vocab_size if config.model else None
    largest, looked_at = corpus.largest_id, corpus.looked_at
    if largest is not None and vocabulary and 2 * largest < vocabulary and looked_at > ENOUGH_TOKENS * vocabulary:
        texts.append(
            f"the largest of {looked_at:,} token ids of {corpus.path} is {largest:,}, but the vocabulary has "
            f"{vocabulary:,}: the corpus may belong to another tokenizer; look at its text with "
            "`castalia data batch CONFIG --step 1`, or name its tokenizer (tokenizer.path)"
        )
    if corpus.documents == 1:
        texts.append(
            f"{corpus.path} is a single document, so valid and test parts are empty; prepare it with one document "
            "for each text, or give data.train, data.valid and data.test"
        )
    return texts


def _architecture(model: ModelConfig) -> ModelShape:
    return ModelShape(
        layers=model.num_layers,
        hidden_size=model.hidden_size,
        heads=model.num_heads,
        kv_heads=model.kv_heads,
        mlp_width=model.mlp_width,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size if model.vocab_size else None,
        hidden_per_layer=model.hidden_size / model.num_layers,
    )


def _memory(ranks: Sequence[Rank], usable: int | None) -> MemoryPlan:
    layout, chooses = ranks[0].layout, ranks[0].layout.recompute == "auto"
    stages = [
        StageMemory(rank.stage.index, rank.stage.layers, layout.gpus // layout.pp, rank.memory()) for rank in ranks
    ]
    largest = max(stage.memory.total for stage in stages)
    policies: dict[str, int] = {}
    for policy in ("none", "selective", "full"):
        other = [replace(rank, layout=replace(layout, recompute=policy), again=frozenset()) for rank in ranks]
        policies[policy] = max(rank.memory().total for rank in other)
    return MemoryPlan(
        stages=stages,
        largest=largest,
        by_recompute=policies | ({"auto": largest} if chooses else {}),
        usable=usable,
        fits=largest <= usable if usable is not None else None,
        computed_again=[again_by_kind(rank) for rank in ranks] if chooses else [],
    )


def _kv_cache(model: ModelConfig, length: int, compute: Compute) -> KvCache:
    per_token = kv_cache_bytes(model, compute.element_bytes)
    every = per_token * (model.max_positions or length) + state_bytes(model, compute.element_bytes)
    return KvCache(per_token, every)


def job_of(config: RunConfig, hardware: Hardware, batch: int, compute: Compute) -> PlanRequest:
    """The request for which layouts are compared. `batch`: sequences of a step."""
    model, length = described(config), config.data.seq_length
    return PlanRequest(model, length, batch, hardware.gpus, hardware.device, compute, hardware.efficiency)


def _time(training: TrainingPlan, job: PlanRequest, layout: Layout) -> TimePlan:
    verdict = evaluate_layout(job, layout)
    tokens_per_second, costs = verdict.tokens_per_second, verdict.costs
    peak = job.device.peak_tflops(job.compute.precision) * 1e12
    return TimePlan(
        device=job.device.name,
        mfu=tokens_per_second / peak_tokens_per_second(job.model, job.length, job.gpus, peak),
        tokens_per_second=tokens_per_second,
        seconds_per_step=costs.total,
        costs=costs,
        seconds=training.tokens / tokens_per_second if training.tokens else None,
    )


def _unknown(plan: RunPlan, known: RunFacts, hardware: Hardware | None) -> list[str]:
    missing = []
    if plan.training.steps is None:
        missing.append("the length of the run: give train.steps=N")
    if not known.corpora:
        missing.append("epochs: the data's .idx files are not here")
    if hardware is None:
        missing.append("times, and whether it fits: give --gpus, for example 8xH100")
    return missing


def _samples_of_a_pass(config: RunConfig, corpus: CorpusFacts) -> float:
    """Samples of the training part. An estimate, because the split counts documents."""
    samples = corpus.tokens / config.data.seq_length if corpus.samples is None else corpus.samples
    if config.data.path is None:
        return samples
    shares = split_shares(config.data.split)
    return samples * shares[0] / sum(shares)


def _epochs(config: RunConfig, known: RunFacts, steps: int | None, batch_size: int) -> list[tuple[CorpusFacts, float]]:
    weights = sum(corpus.weight for corpus in known.corpora)
    if not steps or config.data.stages:  # what a stage reads of a corpus depends on the steps before it
        return []
    seen = sum_until(config.train.batch_size_warmup, steps, batch_size, config.train.earlier_batches)
    return [(c, seen * c.weight / weights / (_samples_of_a_pass(config, c) or 1.0)) for c in known.corpora]


def _run_bytes(config: RunConfig, known: RunFacts) -> int | None:
    if known.kept_checkpoints is None or config.model is None or config.model.vocab_size is None:
        return None
    model = described(config)
    moments = moments_of(config.optimizer).of(model, config.finetune) if config.checkpoint.save_optimizer else 0
    return known.kept_checkpoints * 4 * (sum(map(prod, all_shapes(model, config.finetune).values())) + moments)
