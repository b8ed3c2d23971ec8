"""Values of a config that contradict each other, all reported at once, and values that have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from os.path import normpath

from castalia.config.batch import batch_plan, planned_dp
from castalia.config.fields import is_default
from castalia.config.float8_matrices import MULTIPLE, float8_matrices
from castalia.config.layout_rules import (
    Problem,
    divisors,
    expert_problems,
    multiples,
    pipeline_problems,
    sequence_problems,
    stages_per_rank,
    tensor_problems,
)
from castalia.config.notes import WithoutEffect
from castalia.config.schema import RunConfig, Warmup
from castalia.config.setting import NEOX_DEFAULT
from castalia.config.yaml_files import Findings
from castalia.errors import ConfigError
from castalia.reading import expression_problem, short


def check(config: RunConfig, findings: Findings, any_batch: bool = False, any_data: bool = False) -> None:
    """Add an error for each contradiction, and a note for each value that has no effect or may surprise.

    `any_batch`: do not check that the batch divides, because the caller adapts it. `any_data`: nor that sources have
    what the objective needs, because the caller makes corpora of them.
    """
    # The place (file and line) of all settings involved comes first, so that a message leads to what must be edited.
    for rule in CONTRADICTIONS:
        if (rule is batch and any_batch) or (rule in (corpora, preferences) and any_data):
            continue
        findings.errors += [config.place(*problem.paths) + problem.text for problem in rule(config)]
    for rule in SURPRISES:
        noted = WithoutEffect if rule is without_effect else str
        findings.notes += [noted(config.place(*problem.paths) + problem.text) for problem in rule(config)]


def refuse_contradictions(config: RunConfig) -> None:
    """Raise ConfigError for contradictions in a config that has been completed, e.g. with a checkpoint's model."""
    findings = Findings()
    check(config, findings)
    if findings.errors:
        raise ConfigError("\n".join(dict.fromkeys(findings.errors)))


def require_training(config: RunConfig, dp: int = 1) -> None:
    """Raise ConfigError with everything that the config lacks to train on `dp` data-parallel ranks."""
    missing = not_given(config)
    if has_batch(config):
        try:
            batch_plan(config, dp)
        except ConfigError as error:
            missing.append(str(error))
    if missing:
        raise ConfigError("\n".join(f"this config cannot train: {text}" for text in missing))


def not_given(config: RunConfig) -> list[str]:
    """What a config leaves out and training needs, each with the keys that give it."""
    missing = []
    if config.model is None:
        missing.append("no model: give model.num_layers, hidden_size and num_heads, or name a preset first")
    if config.train.steps is None and config.train.epochs is None:
        missing.append("no end: give train.steps or train.epochs")
    if not (config.data.path or config.data.train):
        missing.append("no data: give data.path (one corpus, split) or data.train (one or more)")
    if not has_batch(config):
        missing.append("no batch: give train.batch_size")
    return missing


def has_batch(config: RunConfig) -> bool:
    """Whether the config says how many sequences a step takes."""
    return bool(config.train.batch_size or config.train.micro_batch_size)


def heads(config: RunConfig) -> Iterator[Problem]:
    """The hidden size must divide into heads, and query heads into groups of key/value heads."""
    model = config.model
    if model is None:
        return
    if not model.attention_layers:
        return
    hidden, count = model.hidden_size, model.num_heads
    if hidden % count and not model.head_dim:
        below, above = hidden // count * count, -(-hidden // count) * count
        fits = " or ".join(str(size) for size in (below, above) if size)
        yield Problem(
            f"model.hidden_size={hidden} does not divide into model.num_heads={count} heads; use {fits}",
            ("model.hidden_size", "model.num_heads"),
        )
    elif model.position == "rotary" and (model.rotary_size % 2 or not model.rotary_size):
        size = max(2, model.rotary_size + 1)
        yield Problem(
            f"model.rotary_pct={model.rotary_pct:g} of a head of {model.head_size} rotates {model.rotary_size} "
            f"dimensions, but they rotate in pairs; model.rotary_pct={size / model.head_size:g} rotates {size}",
            ("model.rotary_pct", "model.hidden_size", "model.num_heads"),
        )
    if count % model.kv_heads:
        yield Problem(
            f"model.num_kv_heads={model.kv_heads} does not divide model.num_heads={count}; "
            f"use one of {divisors(count)}",
            ("model.num_kv_heads", "model.num_heads"),
        )


def placement(config: RunConfig) -> Iterator[Problem]:
    """Norms, windows and scales that do not go together."""
    model = config.model
    if model is None:
        return
    after, kind = model.norm_placement != "before", model.norm
    placed = f"model.norm_placement={model.norm_placement}"
    refused = {
        ("norm_placement", "parallel_residual"): after
        and model.parallel_residual
        and f"{placed} has a norm for each branch, which model.parallel_residual adds at once; use before",
        ("norm_placement", "pattern"): after
        and model.other_kinds
        and f"{placed}: {' and '.join(model.other_kinds)} blocks (model.pattern) have their norm before; use before",
        ("head_dim", "pattern"): "rwkv" in model.other_kinds
        and model.head_size * model.num_heads != model.hidden_size
        and f"model.head_dim={model.head_dim}: rwkv blocks (model.pattern) need hidden_size / num_heads; leave it out",
        ("zero_centered_norms", "norm"): model.zero_centered_norms
        and (kind != "rmsnorm" or not model.rms_eps_inside)
        and f"model.zero_centered_norms goes with model.norm=rmsnorm and rms_eps_inside=true, not with {kind}",
        ("qk_norm", "norm"): isinstance(model.qk_norm, str)
        and kind not in ("layernorm", "rmsnorm")
        and f"model.qk_norm={model.qk_norm} needs model.norm=layernorm or rmsnorm, not {kind}",
        ("head_bias", "tie_embeddings"): model.head_bias
        and model.tie_embeddings
        and "model.head_bias needs a head of its own; set model.tie_embeddings=false",
        ("attention_scale", "mup"): model.attention_scale
        and model.mup
        and "model.attention_scale is what model.mup sets; give model.mup.attention_temperature",
    }
    for names, why in refused.items():
        if why:
            yield Problem(why, tuple(f"model.{name}" for name in names))
    for name in ("window_pattern", "rotary_pattern"):
        if (size := len(getattr(model, name))) > model.num_layers:
            text = f"model.{name} names {size} blocks, of which there are {model.num_layers}; shorten it"
            yield Problem(text, (f"model.{name}", "model.num_layers"))


def mup(config: RunConfig) -> Iterator[Problem]:
    """muP needs an optimizer and initial values for which it knows the scaling."""
    model, rule = config.model, config.optimizer.name
    if model is None or model.mup is None:
        return
    if rule in ("muon", "adafactor"):  # their updates are normalized, so muP's scaling of rates is not theirs
        text = f"model.mup has no rates for optimizer.name={rule}; use adamw, lion or sgd"
        yield Problem(text, ("model.mup", "optimizer.name"))
    for name in ("init_method", "output_init_method"):
        if getattr(model, name).startswith(("xavier", "orthogonal", "scaled_orthogonal")):
            text = (
                f"model.mup needs initial values of a given deviation: model.{name}={getattr(model, name)} has its own"
            )
            yield Problem(f"{text}; use normal", (f"model.{name}", "model.mup"))
    if model.init == "neox" or config.neox_exact:
        yield Problem("model.mup draws its own initial values; neox_exact and model.init=neox do not go with it", ())


def experts(config: RunConfig) -> Iterator[Problem]:
    """What a mixture of experts needs, and what it does not go with."""
    model = config.model
    if model is None or model.experts is None:
        return
    wanted = model.experts
    if wanted.top_k > wanted.count:
        text = f"model.experts.top_k={wanted.top_k} is more than model.experts.count={wanted.count}; lower it"
        yield Problem(text, ("model.experts.top_k", "model.experts.count"))
    if wanted.first >= model.num_layers:
        text = (
            f"model.experts.first={wanted.first} leaves no block with experts: there are {model.num_layers}; lower it"
        )
        yield Problem(text, ("model.experts.first", "model.num_layers"))
    if wanted.norm_topk and wanted.top_k == 1:
        text = "model.experts.norm_topk=true divides the only share of a token by itself"
        yield Problem(
            f"{text}, so that its router learns nothing; set it to false, or top_k to 2",
            ("model.experts.norm_topk", "model.experts.top_k"),
        )
    if model.mup:
        text = "model.mup has no rates for the matrices of model.experts; leave one of them out"
        yield Problem(text, ("model.mup", "model.experts.count"))
    if config.train.compile is True and config.train.recompute != "none":
        text = f"train.recompute={config.train.recompute}: blocks with model.experts are two graphs when compiled"
        yield Problem(
            f"{text}, which cannot be computed again together; set train.compile=false, or recompute=none",
            ("train.compile", "train.recompute", "model.experts.count"),
        )
    if wanted.jitter and config.parallel.tp > 1:
        text = f"parallel.tp={config.parallel.tp}: tensor ranks draw different numbers for model.experts.jitter"
        yield Problem(f"{text}; set one of them to its default", ("parallel.tp", "model.experts.jitter"))


def kinds(config: RunConfig) -> Iterator[Problem]:
    """What blocks without attention do not go with."""
    model = config.model
    if model is None or not model.other_kinds:
        return
    named, parallel = f"{' and '.join(model.other_kinds)} blocks (model.pattern)", config.parallel
    refused = {
        "model.mup": model.mup is not None and "model.mup has no rates for their matrices",
        "train.compile": config.train.compile is True and "train.compile=true makes one graph for blocks of one kind",
        "data.mask_documents": config.data.mask_documents and "data.mask_documents: they mix the tokens of documents",
        "parallel.cp": parallel.cp > 1
        and f"parallel.cp={parallel.cp} gives each rank a part of a sequence, of which they need all; use 1",
    }
    for path, why in refused.items():
        if why:
            yield Problem(f"{named}: {why}", (path, "model.pattern"))
    if len(model.pattern) > model.num_layers:
        text = f"model.pattern names {len(model.pattern)} blocks, of which there are {model.num_layers}; shorten it"
        yield Problem(text, ("model.pattern", "model.num_layers"))


def lengths(config: RunConfig) -> Iterator[Problem]:
    """Sequences must not be longer than the model's positions."""
    model, length = config.model, config.data.seq_length
    if model and model.max_positions and model.max_positions < length:
        # Else a checkpoint describes it, and it cannot be changed.
        described = any(path.startswith("model.") for path in config.origins)
        yield Problem(
            f"data.seq_length={length} is longer than model.max_positions={model.max_positions}; "
            "shorten it" + (f" or set model.max_positions={length}" if described else ""),
            ("data.seq_length", "model.max_positions"),
        )


def length_warmup(config: RunConfig) -> Iterator[Problem]:
    """Sequence lengths may rise only where ranks do not exchange tensors of a fixed length."""
    warmup, length, parallel = config.data.seq_length_warmup, config.data.seq_length, config.parallel
    if warmup is None:
        return
    path, multiple = "data.seq_length_warmup", warmup.unit
    yield from _warmup(config, warmup, path, "data.seq_length", length)
    for name in ("pp", "cp"):
        if getattr(parallel, name) > 1:
            text = f"{path} changes the shape of what ranks exchange, which parallel.{name} does not; set it to 1"
            yield Problem(text, (f"{path}.start", f"parallel.{name}"))
    # Every length that occurs must divide, not only the full one.
    if parallel.sequence_parallel and multiple % parallel.tp:
        text = f"parallel.sequence_parallel: the lengths of {path}, multiples of {multiple}, do not divide by"
        yield Problem(f"{text} parallel.tp={parallel.tp}", ("parallel.sequence_parallel", f"{path}.multiple"))


def stages(config: RunConfig) -> Iterator[Problem]:
    """Stages of the data follow one another, and fit into what is planned for data.seq_length."""
    data, parallel, path = config.data, config.parallel, "data.stages"
    if not data.stages:
        return
    firsts = [stage.first_step for stage in data.stages]
    if any(later <= first for first, later in pairwise(firsts)):
        yield Problem(
            f"{path}: stages begin at steps {', '.join(map(str, firsts))}; list them in rising order", (path,)
        )
    lengths = {stage.seq_length or data.seq_length for stage in data.stages}
    if max(lengths) > data.seq_length:
        text = f"{path}: seq_length={max(lengths)} is above data.seq_length={data.seq_length}, the longest of the run"
        yield Problem(
            f"{text}; set data.seq_length={max(lengths)} and give shorter stages theirs", (path, "data.seq_length")
        )
    for length in sorted(lengths - {data.seq_length}):
        for name in ("pp", "cp"):
            if getattr(parallel, name) > 1:
                text = (
                    f"{path}: seq_length={length} changes the shape of what ranks exchange, which parallel.{name} does"
                )
                yield Problem(f"{text} not; set it to 1", (path, f"parallel.{name}"))
        if parallel.sequence_parallel and length % parallel.tp:
            text = (
                f"{path}: parallel.sequence_parallel: seq_length={length} does not divide by parallel.tp={parallel.tp}"
            )
            yield Problem(text, (path, "parallel.sequence_parallel"))
    refused = {
        "data.seq_length_warmup": data.seq_length_warmup is not None and "give its lengths as stages",
        "train.objective": config.train.objective != "causal" and "stages are for train.objective=causal",
        "train.epochs": config.train.epochs is not None and "a run with stages has no epochs: give train.steps",
        "neox_exact": config.neox_exact and "GPT-NeoX has no stages",
    }
    for key, why in refused.items():
        if why:
            yield Problem(f"{path} does not go with {key}: {why}", (path, key))


def batch_warmup(config: RunConfig) -> Iterator[Problem]:
    """The batch size may rise only where the number of micro-batches is free."""
    warmup, train, path = config.train.batch_size_warmup, config.train, "train.batch_size_warmup"
    if warmup is None:
        return
    if train.batch_size is None or train.accumulation is not None:
        text = f"{path} needs train.batch_size, which it rises to, and not train.accumulation, which rises with it"
        yield Problem(text, (f"{path}.start", "train.accumulation"))
        return
    yield from _warmup(config, warmup, path, "train.batch_size", train.batch_size)
    if config.parallel.pp > 1:
        text = f"{path} changes the number of micro-batches, which a pipeline's schedule is made for; set parallel.pp=1"
        yield Problem(text, (f"{path}.start", "parallel.pp"))
    if config.neox_exact:
        yield Problem(f"neox_exact: GPT-NeoX has no {path}", (f"{path}.start", "neox_exact"))


def _warmup(config: RunConfig, warmup: Warmup, path: str, whole_path: str, whole: int) -> Iterator[Problem]:
    if not warmup.unit <= warmup.start <= whole:
        text = f"{path}.start={warmup.start} must lie between its multiple, {warmup.unit}, and {whole_path}={whole}"
        yield Problem(text, (f"{path}.start", f"{path}.multiple", whole_path))
    if config.train.objective != "causal":
        text = f"train.objective={config.train.objective} judges whole texts in steps of one size: remove {path}"
        yield Problem(text, ("train.objective", f"{path}.start"))


def layout(config: RunConfig) -> Iterator[Problem]:
    """The layout must divide devices, model and sequences (see `layout_rules.py`)."""
    model, parallel = config.model, config.parallel
    if parallel.gpus and parallel.gpus % parallel.model_ranks:
        yield Problem(
            f"parallel.gpus={parallel.gpus} does not divide by tp * pp * cp = {parallel.tp} * {parallel.pp} * "
            f"{parallel.cp}; {multiples(parallel.gpus, parallel.model_ranks)[0]} would",
            ("parallel.gpus", "parallel.tp", "parallel.pp", "parallel.cp"),
        )
    if model is None:
        return
    yield from tensor_problems(model, parallel.tp)
    yield from expert_problems(model, parallel)
    yield from pipeline_problems(model, parallel.pp, stages_per_rank(parallel))
    yield from sequence_problems(parallel, config.data.seq_length)


def batch(config: RunConfig) -> Iterator[Problem]:
    """The batch must divide: over the declared devices, or, if none are declared, over at least one number of ranks."""
    train = config.train
    # Without declared devices, one rank is the most lenient case: what it cannot divide, no number of ranks can.
    dp = planned_dp(config) if config.parallel.gpus else None
    whole = (train.micro_batch_size or 1) * (train.accumulation or 1)
    if dp == 0 or not has_batch(config):
        return
    if dp or (train.batch_size and train.batch_size % whole):
        try:
            batch_plan(config, dp or 1)
        except ConfigError as error:
            yield Problem(str(error), ())


def learning_rates(config: RunConfig) -> Iterator[Problem]:
    """Learning rates, betas and the parts of the schedule must fit together."""
    optimizer, schedule = config.optimizer, config.schedule
    if schedule.min_lr > optimizer.lr:
        yield Problem(
            f"schedule.min_lr={schedule.min_lr:g} is above optimizer.lr={optimizer.lr:g}, the highest rate; lower it",
            ("schedule.min_lr", "optimizer.lr"),
        )
    # Here and not in the schema, which cannot bound the entries of a tuple with a message for both.
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Problem(
            f"optimizer.betas={list(optimizer.betas)}: both must be at least 0 and below 1", ("optimizer.betas",)
        )
    if schedule.style == "wsd" and schedule.warmup_steps is None and schedule.warmup + schedule.cooldown > 1:
        yield Problem(
            f"schedule.warmup={schedule.warmup:g} and schedule.cooldown={schedule.cooldown:g} are more than the whole",
            ("schedule.warmup", "schedule.cooldown"),
        )
    if config.neox_exact and (schedule.style in ("wsd", "inverse_sqrt") or schedule.warmup_steps is not None):
        what = "schedule.warmup_steps" if schedule.warmup_steps is not None else f"schedule.style={schedule.style}"
        yield Problem(f"neox_exact: GPT-NeoX has no {what}", ("schedule.style", "schedule.warmup_steps"))


def expressions(config: RunConfig) -> Iterator[Problem]:
    """Regular expressions must be valid."""
    finetune = config.finetune
    given = {"finetune.train": finetune.train, "finetune.freeze": finetune.freeze}
    for path, patterns in (given | {"optimizer.groups": [group.match for group in config.optimizer.groups]}).items():
        for pattern in patterns:
            if reason := expression_problem(pattern):
                yield Problem(f"{path}: {short(pattern)} is not a valid regular expression: {reason}", (path,))


def corpora(config: RunConfig) -> Iterator[Problem]:
    """Packing needs labels, and generation from a file needs the file."""
    # One document in a sample leaves padding, on which only labels can switch the loss off.
    unlabelled = bool(config.data.path) or not all(source.labels for source in config.data.train)
    if config.data.packing == "unpacked" and unlabelled and config.train.objective == "causal":
        yield Problem(
            "data.packing=unpacked takes one document a sample and needs labels in every source of data.train",
            ("data.packing", "data.train"),
        )
    if config.neox_exact and config.data.holdout != "contiguous":
        text = f"neox_exact=true takes validation as the original does, data.holdout={config.data.holdout} does not"
        yield Problem(f"{text}; leave one of them out", ("neox_exact", "data.holdout"))
    if config.generate.mode == "input-file" and not config.generate.input_file:
        yield Problem("generate.mode=input-file needs generate.input_file", ("generate.mode",))


def preferences(config: RunConfig) -> Iterator[Problem]:
    """Preference learning needs whole texts, unpacked, with what its objective compares."""
    objective, data, layout = config.train.objective, config.data, config.parallel
    if objective == "causal":
        return
    key, sources = f"train.objective={objective}", [*data.train, *data.valid, *data.test]
    paths = ("train.objective",)
    if data.path:
        yield Problem(f"{key} needs data.train: a single data.path has neither pairs nor rewards", paths)
    if data.packing != "unpacked":
        text = f"{key} judges each text by itself: data.packing={data.packing} puts several into one sample"
        yield Problem(f"{text}; set data.packing=unpacked (NeoX: pack_impl)", (*paths, "data.packing"))
    field = "rewards" if objective == "kto" else "rejected"
    if not all(getattr(source, field) for source in sources):
        yield Problem(f"{key} needs `{field}` in every source of data.train, data.valid and data.test", paths)
    for name in ("pp", "cp"):
        if getattr(layout, name) > 1:
            text = f"{key} needs whole sequences and the whole model on the tensor ranks; set parallel.{name}=1"
            yield Problem(text, (*paths, f"parallel.{name}"))
    if config.finetune.add_tokens and objective in ("dpo", "kto"):
        text = f"{key} compares with a reference model, which knows no token of finetune.add_tokens"
        yield Problem(text, (*paths, "finetune.add_tokens"))
    if objective == "kto" and config.train.micro_batch_size == 1:
        text = f"{key} compares the sequences of a micro-batch; set train.micro_batch_size to 2 or more"
        yield Problem(text, (*paths, "train.micro_batch_size"))
    if config.neox_exact:
        yield Problem(f"neox_exact covers train.objective=causal alone, not {key}", (*paths, "neox_exact"))


def float8(config: RunConfig) -> Iterator[Problem]:
    """Products in float8 need matrices to multiply, and a loss that does not compare with a model in bf16."""
    if config.precision.compute != "fp8":
        return
    paths, key = ("precision.compute",), "precision.compute=fp8"
    if config.train.objective in ("dpo", "kto"):
        text = f"{key} rounds by more than train.objective={config.train.objective} may find between a model and its "
        yield Problem(f"{text}reference model, which computes in bf16; set precision.compute=bf16", paths)
    tp = config.parallel.tp
    if config.model and not any(tensor_problems(config.model, tp)) and not float8_matrices(config.model, tp)[0]:
        text = f"{key} multiplies the matrices of attention and dense MLPs in float8, of which this model has none"
        yield Problem(f"{text} whose sizes are multiples of {MULTIPLE}; set precision.compute=bf16", paths)


def profile(config: RunConfig) -> Iterator[Problem]:
    """A profile must not end before it starts."""
    wanted = config.log.profile
    if wanted and wanted.stop < wanted.start:
        yield Problem(
            f"log.profile.stop={wanted.stop} is before log.profile.start={wanted.start}",
            ("log.profile.start", "log.profile.stop"),
        )


def watch(config: RunConfig) -> Iterator[Problem]:
    """Rewinding after a spike needs checkpoints, with the optimizer state, that are still there."""
    wanted, checkpoint = config.watch, config.checkpoint
    if wanted.policy != "rewind":
        return
    if not checkpoint.save_optimizer:
        yield Problem(
            "watch.policy=rewind goes back to checkpoints of its own, with the optimizer's state; remove "
            "checkpoint.save_optimizer=false",
            ("watch.policy", "checkpoint.save_optimizer"),
        )
    if checkpoint.keep_last and checkpoint.keep_last < wanted.back:
        yield Problem(
            f"watch.back={wanted.back} checkpoints are more than checkpoint.keep_last={checkpoint.keep_last}; "
            f"keep {wanted.back}",
            ("watch.back", "checkpoint.keep_last"),
        )


def idle_layout(config: RunConfig) -> Iterator[Problem]:
    """A layout setting that has no effect because the setting it depends on was, most likely, forgotten.

    Where that one was given explicitly (`parallel.pp: 1`, as the config of every run does), the setting is only noted
    as without effect, because a run's config must also work on fewer ranks.
    """
    parallel = config.parallel
    # Setting of `parallel` -> the setting on which it depends, and the values that make it effective.
    switches = {
        "pipeline": ("pp", "2 or more"),
        "stages_per_rank": ("pp", "2 or more"),
        "cp_kind": ("cp", "2 or more"),
        "dp_replicate": ("zero", "1, 2 or 3"),
    }
    for name, (switch, values) in switches.items():
        path, by = f"parallel.{name}", f"parallel.{switch}"
        if path in config.origins and by not in config.origins and not is_default(path, config.at(path)):
            value, default = getattr(parallel, name), getattr(parallel, switch)
            text = f"{path}={value} needs {by} of {values}, which is not set; set it, or remove {path}"
            yield Problem(f"{text} (with {by}={default} written out it may stay, without effect)", (path,))


def folders(config: RunConfig) -> Iterator[Problem]:
    """A new run should not be written to the folder that its weights come from."""
    checkpoint = config.checkpoint
    if checkpoint.init_from and checkpoint.dir and normpath(checkpoint.init_from) == normpath(checkpoint.dir):
        yield Problem(
            f"checkpoint.init_from and checkpoint.dir are both {checkpoint.dir}; training will want a folder of its "
            "own for the new run: set another checkpoint.dir (NeoX: save)",
            ("checkpoint.init_from", "checkpoint.dir"),
        )


def without_effect(config: RunConfig) -> Iterator[Problem]:
    """Values that were given explicitly and are overruled by another value."""
    model, data, checkpoint, parallel = config.model, config.data, config.checkpoint, config.parallel
    rule, schedule = config.optimizer.name, config.schedule
    loads, goal = checkpoint.resume or checkpoint.init_from, config.train.objective
    mixture = model.experts if model else None
    # Setting -> why it has no effect, false where it has one.
    idle = {
        "model.shared_norm": model and model.shared_norm and not model.parallel_residual and "no parallel_residual",
        "model.rotary_pct": model
        and model.rotary_pct != 1
        and model.position != "rotary"
        and "positions do not rotate",
        "model.rope_scaling": model and model.rope_scaling and model.position != "rotary" and "positions do not rotate",
        "model.rotary_pattern": model and model.position != "rotary" and "positions do not rotate",
        "model.position_offset": model and model.position != "learned" and "positions are not learned",
        "model.window_pattern": model and not model.sliding_window and "there is no sliding_window",
        "model.experts.jitter": mixture and mixture.router != "topk" and f"model.experts.router is {mixture.router}",
        "model.experts.sinkhorn_stop": mixture
        and mixture.router != "sinkhorn"
        and f"model.experts.router is {mixture.router}",
        "model.experts.balance_rate": mixture
        and mixture.router != "balanced"
        and f"model.experts.router is {mixture.router}",
        "model.experts.shared_gate": mixture and not mixture.shared_width and "there is no shared_width",
        "optimizer.betas": rule in ("sgd", "adafactor") and f"{rule} has none",
        "optimizer.eps": rule in ("lion", "sgd", "adafactor") and f"{rule} has none",
        "optimizer.momentum": rule not in ("sgd", "muon") and f"{rule} has none",
        "schedule.warmup": schedule.warmup_steps is not None and "schedule.warmup_steps replaces it",
        "schedule.cooldown": schedule.style != "wsd" and f"schedule.style is {schedule.style}",
        "schedule.decay_fraction": schedule.decay_steps and schedule.decay_fraction and "decay_steps is given",
        "train.z_loss": goal in ("dpo", "kto") and f"train.objective is {goal}",
        "preference.loss": goal != "dpo" and f"train.objective is {goal}",
        "preference.reference_free": goal != "dpo" and f"train.objective is {goal}",
        "preference.beta": goal not in ("dpo", "kto", "orpo") and f"train.objective is {goal}",
        "preference.reference": (goal not in ("dpo", "kto") or config.preference.reference_free)
        and "no reference model is asked for",
        "preference.desirable_weight": goal != "kto" and f"train.objective is {goal}",
        "preference.undesirable_weight": goal != "kto" and f"train.objective is {goal}",
        "data.split": data.train and "data.train is given",
        "data.holdout": data.train and "data.train is given",
        "data.weight_alpha": data.weight_alpha != 1 and not data.weight_by_documents and "no weight_by_documents",
        "parallel.sequence_parallel": parallel.sequence_parallel and parallel.tp == 1 and "parallel.tp is 1",
        "parallel.cp_kind": parallel.cp == 1 and "parallel.cp is 1",
        "parallel.dp_replicate": parallel.dp_replicate and parallel.zero == 0 and "parallel.zero is 0: all are copies",
        "parallel.pipeline": parallel.pp == 1 and "parallel.pp is 1",
        "parallel.stages_per_rank": parallel.pp == 1 and "parallel.pp is 1",
        "checkpoint.log_until": checkpoint.log_until and not checkpoint.log_base and "there is no log_base",
        "checkpoint.keep_every": checkpoint.keep_every and not checkpoint.keep_last and "there is no keep_last",
        "checkpoint.step": checkpoint.step is not None and not loads and "nothing is loaded",
        "checkpoint.schedule_from": checkpoint.schedule_from and not checkpoint.resume and "nothing is resumed",
        "checkpoint.load_optimizer": not checkpoint.load_optimizer and not checkpoint.resume and "nothing is resumed",
        "watch.back": config.watch.policy != "rewind" and f"watch.policy is {config.watch.policy}",
        "eval.patience": config.eval.patience and not config.eval.every and "eval.every is null",
        "eval.every": data.train and not data.valid and "data.valid is empty, so there is nothing to evaluate on",
    }
    for path, reason in idle.items():
        given = config.origins.get(path, NEOX_DEFAULT) != NEOX_DEFAULT
        if reason and given and not is_default(path, config.at(path)):
            yield Problem(f"{path} has no effect: {reason}", (path,))


CONTRADICTIONS = (
    heads, placement, mup, experts, kinds, lengths, length_warmup, stages, batch_warmup, layout, batch, learning_rates,
    expressions, corpora, preferences, float8, profile, watch, idle_layout,
)  # fmt: skip
SURPRISES = (folders, without_effect)
