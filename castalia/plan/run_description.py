"""What a run will do, in words, for `castalia plan` and for the report at the start of training."""

from __future__ import annotations

from collections.abc import Iterator

from castalia.config.attention_kernels import AMPERE, Capability, KernelChoice, reasons_for_bias, training_choice
from castalia.config.float8_matrices import activation_type, describe_float8
from castalia.config.neox.clipping import effective_clip_norm
from castalia.config.schema import RunConfig
from castalia.plan.devices import auto_precision
from castalia.plan.plan_parts import TrainingPlan
from castalia.units import memory_size

MANY_EPOCHS = 4  # further repetitions of the data teach little (2305.16264)


def describe_training(training: TrainingPlan) -> Iterator[tuple[str, str]]:
    """The `training` part of a plan as rows of a name and a text."""
    split = f"micro-batch {training.micro_batch} x accumulation {training.accumulation}"
    if training.data_ranks > 1:
        split += f" x {training.data_ranks} data ranks"
    size = f"{training.sequences_per_step:,} {training.samples} x {training.seq_length}"
    yield "batch", f"{size} = {training.tokens_per_step:,} tokens a step ({split})"
    for what, (start, whole, steps) in training.rising.items():
        yield "rising", f"from {start:,} {what} to {whole:,} in about {steps:,} steps"
    if training.steps:
        yield "the run", f"{training.steps:,} steps, {training.tokens:,} tokens"
    for path, epochs in training.epochs.items():
        yield (
            "epochs",
            f"{passes_text(epochs)} of {path}" + (f": more than {MANY_EPOCHS}" if epochs > MANY_EPOCHS else ""),
        )
    if training.first_lr is not None and training.last_lr is not None:
        style = "" if training.style == "constant" else f" until step {training.decay_end:,}"
        yield (
            "learning rate",
            f"{training.first_lr:.3g} first, {training.last_lr:.3g} last, {training.peak_lr:.3g} at most; "
            f"{training.style}{style}",
        )
    if training.warmup_steps:
        yield "warm-up", f"{training.warmup_steps:,g} steps, {training.warmup_tokens:,.0f} tokens"
    elif training.warmup_steps is not None:
        yield "warm-up", "none"
    for name in ("clipping", "precision", "attention", "determinism", "logged", "evaluated", "saved"):
        yield name, getattr(training, name)
    if training.checkpoints_bytes is not None:
        free = "" if training.free_bytes is None else f"; {memory_size(training.free_bytes)} are free there"
        kept = (
            "1 checkpoint takes" if training.checkpoints_kept == 1 else f"{training.checkpoints_kept} checkpoints take"
        )
        yield "disk", f"{kept} {memory_size(training.checkpoints_bytes)}{free}"
    if training.random_loss:
        yield "random loss", f"{training.random_loss:.2f}, by guessing at random: ln(vocabulary)"


def passes_text(epochs: float) -> str:
    """Passes over a corpus, of which small shares keep their digits."""
    return f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"


def clipping(config: RunConfig) -> str:
    """How gradients are clipped."""
    clip = config.optimizer.clip_norm
    if clip is None:
        return "off"
    if config.neox_exact and effective_clip_norm(clip, "head") is None:
        return "off as in GPT-NeoX, which ignores its default of 1 (neox_exact; its first release clips)"
    return f"gradients are scaled down to a norm of {clip:g}"


def precision(config: RunConfig, device: str | None = None) -> str:
    """The number formats of the run. `device`: "cpu" or "cuda", None if unknown."""
    wanted = config.precision.compute
    compute = {"auto": "bf16 where the hardware has it, else fp32,"}.get(wanted, wanted)
    rest = "fp32 weights, gradients and optimizer state; norms, softmax and loss are summed in fp32"
    more = {"fp16": f"; {loss_scale(config)}", "fp8": f"; {describe_float8(config)}"}
    if device == "cpu":
        more["fp8"] += "; on a CPU for its numbers alone, as the same values are multiplied in bf16, more slowly"
    if device == "cuda":
        more["fp32"] = "; no TF32 (10 bits, faster, Ampere and later: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1)"
    return f"{compute} compute; {rest}{more.get(compute, '')}"


def loss_scale(config: RunConfig) -> str:
    """The loss scale of fp16."""
    scale = config.precision.loss_scale
    return f"loss scale {scale.static:g}" if scale.static else f"dynamic loss scale from {scale.initial:g}"


def attention(config: RunConfig, device: str | None = None, capability: Capability = AMPERE) -> str:
    """Which of PyTorch's attention kernels training uses, and why.

    `device`: "cpu" or "cuda", None if unknown. `capability`: of the GPUs.
    """
    model, length, parallel, wanted = config.model, config.data.seq_length, config.parallel, config.precision.compute
    if model is None:
        return "unknown: no model is described"
    masked = " and ".join(reasons_for_bias(model, model.window, length, config.data.mask_documents))
    what = f"causal with a mask for {masked}" if masked else "causal, without a mask"
    if parallel.cp > 1 and parallel.cp_kind != "ulysses":
        share = 2 - 1 / parallel.cp
        what += f"; the last of {parallel.cp} context ranks attends {share:.3g} times as much as the mean"
    if device is None:
        return f"scaled_dot_product_attention, {what}; the kernel is chosen for the device"
    choice = training_choice(
        model,
        None if device == "cpu" else capability,
        activation_type(auto_precision(capability >= AMPERE) if wanted == "auto" else wanted),
        length,
        documents=config.data.mask_documents,
        gathers=parallel.cp > 1 and parallel.cp_kind == "gather",
        cudnn=not (config.train.deterministic or (parallel.cp > 1 and parallel.cp_kind == "ring")),
    )
    return f"{kernel(choice)}; {what}"


def kernel(choice: KernelChoice) -> str:
    """The name of a kernel and, if it is neither flash nor cuDNN, why and at what cost."""
    parts = [f"{choice.kernel} kernel"]
    if choice.why:
        parts.append(f"instead of flash: {choice.why}")
    if choice.repeats:
        parts.append("keys and values repeated for each query head")
    if choice.kernel == "plain":
        parts.append("all scores are made")
    return ", ".join(parts)


def repeats_bits(config: RunConfig, device: str | None) -> bool:
    """Whether a repeated step gives the same bits."""
    return config.train.deterministic or device == "cpu"


def determinism(config: RunConfig, device: str | None = None) -> str:
    """Whether a repeated step gives the same bits. `device`: "cpu" or "cuda", None if unknown."""
    if repeats_bits(config, device):
        why = " (train.deterministic)" if config.train.deterministic else ""
        return f"the same bits when a step is repeated on as many processes and threads{why}"
    where = "on GPUs " if device is None else ""
    return f"{where}the last bits differ when a step is repeated: kernels add in any order; train.deterministic=true"


def logging(config: RunConfig) -> str:
    """Where metrics are written, and how often."""
    board = f" and TensorBoard files in {config.log.tensorboard}" if config.log.tensorboard else ""
    return f"every step to metrics.jsonl{board}, a line here every {config.log.every} steps"


def evaluation(config: RunConfig) -> str:
    """When the run is evaluated, and on how much."""
    if config.eval.batches == 0 or not (config.data.path or config.data.valid):
        return "never"
    when = [f"every {config.eval.every} steps"] if config.eval.every else []
    when += ["at the end"] if config.eval.at_end else []
    data = "all validation data" if config.eval.batches is None else f"{config.eval.batches} batches"
    patience = config.eval.patience
    stops = f"; stops after {patience} without a lower loss" if patience and config.eval.every else ""
    return f"{' and '.join(when)} on {data}{stops}" if when else "never"


def saves(config: RunConfig) -> str:
    """When checkpoints are saved, and which of them are kept."""
    saves = config.checkpoint
    parts = [f"every {saves.every} steps"] if saves.every else []
    if saves.log_base:
        until = f" up to step {saves.log_until}" if saves.log_until else ""
        parts.append(f"at steps that are powers of {saves.log_base:g}{until}")
    if saves.steps:
        parts.append("at steps " + ", ".join(map(str, saves.steps[:12])) + (", ..." if len(saves.steps) > 12 else ""))
    if saves.keep_last:
        milestones = f" and multiples of {saves.keep_every}" if saves.keep_every else ""
        parts.append(f"keeping the last {saves.keep_last}{milestones}")
    if saves.save_minutes:
        parts.append(f"after {saves.save_minutes:g} minutes without a save")
    if saves.keep_best and evaluation(config) != "never":
        parts.append("the best by validation loss is kept")
    return "; ".join([*parts, "at the end"]) + ("" if saves.save_optimizer else "; without optimizer state")
