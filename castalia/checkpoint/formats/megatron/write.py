"""Write the folders of Megatron-DeepSpeed (the BigScience fork): GPT models with tied embeddings, in layer files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.file_plan import Plan, TargetLayout, WriteOptions, pt_output
from castalia.checkpoint.formats.deepspeed.assemble import whole
from castalia.checkpoint.formats.deepspeed.write import (
    DeepSpeedFolder,
    adam_steps,
    cut_stages,
    kind_of,
    model_state,
    state_of,
    weights_of,
)
from castalia.checkpoint.formats.huggingface.names import lacking
from castalia.checkpoint.formats.megatron.read import GATED, POSITIONS
from castalia.checkpoint.formats.neox.names import MEGATRON, megatron_qkv, table
from castalia.checkpoint.formats.neox.write import padded
from castalia.checkpoint.formats.neox.written_config import (
    PRECISIONS,
    Vocabulary,
    check_layout,
    loss_scaler,
    next_rate,
    rows_note,
    schedule,
    step_batch,
    vocabulary,
    weight_dtype,
)
from castalia.checkpoint.neox_defects import clip_norm_of, micro_batches_note, with_micro_batches
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.rules import STATE_ROLES, Role, to_theirs
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.tokenizer_files import megatron_tokenizer, written_tokenizer
from castalia.config.schema import ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef
from castalia.storage.pt_writer import Instance

VERSION = 3.0  # `checkpoint_version`: the order of fused rows
RANDOM = "there are no states of random generators: start Megatron-DeepSpeed with --no-load-rng"
# The values of settings that Megatron-DeepSpeed can compute; None: any.
HOLDS: dict[str, set | None] = {
    "tie_embeddings": {True}, "parallel_residual": {False}, "norm": {"layernorm"}, "qk_norm": {False},
    "position": set(POSITIONS.values()), "rotary_pct": {1.0}, "rope_scaling": {None}, "sliding_window": {None},
    "attention_bias": {True}, "mlp_bias": {True}, "gated_mlp": None,
}  # fmt: skip


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files of a step's folder. Raises CheckpointError for a model that Megatron-DeepSpeed cannot compute."""
    model, layout, config = architecture(checkpoint), options.layout, checkpoint.config
    assert config is not None
    check(model, layout, options.era, checkpoint.path)
    dtype, vocab = weight_dtype(checkpoint), vocabulary(checkpoint, model, layout.tp)
    train, batch_note = step_batch(checkpoint, layout)
    source, micro_batches = checkpoint, train.accumulation or 1
    checkpoint = with_micro_batches(checkpoint, micro_batches)  # it always uses DeepSpeed's pipeline engine
    job = _job(checkpoint, model, vocab, dtype, layout)
    tokenizer, notes = megatron_tokenizer(checkpoint)
    fields = _arguments(checkpoint, config, model, vocab, dtype, train, layout)
    fields |= _tokenizer_arguments(written_tokenizer(checkpoint, tokenizer, options.folder))
    arguments = Instance("argparse.Namespace", fields=fields)
    rates, given = _in_samples(checkpoint, config, train), {"zero_optimization": {"stage": layout.zero}}
    outputs = [*tokenizer, *job.layer_files()]
    for number, stage, rank in job.model_ranks():
        groups = job.parameter_groups(stage, rank, checkpoint.path)
        state = model_state(job, groups, rank, checkpoint.progress, config.data.seq_length, rates, given) | {
            "args": arguments,
            "checkpoint_version": VERSION,
            "iteration": checkpoint.progress.step,
            "tokens": checkpoint.progress.tokens,
            "checkpoint_info": {"padded_vocab_size": vocab.rows, "original_vocab_size": vocab.logical},
        }
        outputs.append(pt_output(f"mp_rank_{number:02d}_model_states.pt", state))
        outputs += job.optimizer_files(number, groups, {key: state[key] for key in ("ds_config", "ds_version")})
    own_notes = (batch_note, rows_note(checkpoint, vocab), micro_batches_note(source, micro_batches), RANDOM)
    return Plan(tuple(outputs), (*notes, *filter(None, own_notes)))


def check(model: ModelConfig, layout: TargetLayout, era: str, path: str) -> None:
    """Raises CheckpointError that names the settings that Megatron-DeepSpeed cannot compute."""
    wrong = lacking(model, HOLDS)
    activations = set(GATED.values()) if model.gated_mlp else {"gelu", "gelu_tanh"}
    if model.activation not in activations:
        wrong.append(f"model.activation={model.activation} (only {' or '.join(sorted(activations))})")
    if model.kv_heads != model.num_heads:
        wrong.append(f"model.num_kv_heads={model.num_kv_heads}")
    if wrong:
        raise CheckpointError(
            f"{path}: Megatron-DeepSpeed cannot hold {'; '.join(wrong)}. --to native keeps everything, --to neox most"
        )
    if era != "head" or layout.pp < 1:
        raise CheckpointError("--to megatron-deepspeed has one era, and pipeline files only: use pp=1 or more")
    check_layout(model, layout, path)


def _job(
    checkpoint: Checkpoint, model: ModelConfig, vocab: Vocabulary, dtype: torch.dtype, layout: TargetLayout
) -> DeepSpeedFolder:
    config, state, tp = checkpoint.config, checkpoint.optimizer, layout.tp
    assert config is not None
    rules = table(MEGATRON, model, tp, megatron_qkv(model, tp, VERSION))
    kind = kind_of(dtype, layout.zero, "head") if state else None
    tensors: dict[Role, Mapping[str, Sequence[TensorRef]]]
    tensors = {"weight": to_theirs(rules, padded(weights_of(checkpoint, kind), vocab.rows))}
    for role in STATE_ROLES if state else ():
        tensors[role] = to_theirs(rules, padded(state_of(checkpoint, role), vocab.rows), role)
    rates, optimizer = schedule(checkpoint, config), config.optimizer
    common = {
        "lr": next_rate(rates) if rates else optimizer.lr,
        "bias_correction": True,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "step": 0,
    }
    decays = (optimizer.weight_decay, optimizer.weight_decay, 0.0)
    return DeepSpeedFolder(
        layout=layout,
        kind=kind,
        tensors=tensors,
        steps=adam_steps(checkpoint, rules),
        stages=cut_stages([0] * 3 + [1] * model.num_layers + [0] * 4, layout.pp, "head"),
        tied=f"{MEGATRON.embedding}.",
        groups=[{**common, "weight_decay": decay} for decay in decays],
        scaler=loss_scaler(checkpoint, config, dtype, "head"),
        clip=clip_norm_of(checkpoint) or 0.0,
    )


def _in_samples(checkpoint: Checkpoint, config: RunConfig, train: TrainConfig) -> dict[str, Any] | None:
    """The state of Megatron's schedule (`AnnealingLR`), which counts samples; None where their number is unknown."""
    rates, batch = schedule(checkpoint, config), train.batch_size
    if rates is None or batch is None:
        return None
    warmup = _warmup(rates, config)
    steps, fraction = warmup["lr_warmup_iters"], warmup["lr_warmup_fraction"]
    return {
        "max_lr": rates["start_lr"],
        "warmup_steps": steps * batch if fraction is None else fraction * (rates["end_iter"] * batch),
        "num_steps": rates["num_iters"] * batch,
        "warmup_tokens": 0,
        "num_tokens": checkpoint.progress.tokens,
        "decay_style": rates.get("decay_style", config.schedule.style),
        "decay_steps": rates["end_iter"] * batch,
        "min_lr": rates["min_lr"],
    }


def _warmup(rates: Mapping[str, Any] | None, config: RunConfig) -> dict[str, Any]:
    """The length of the warmup in Megatron's terms: whole steps, or a share of the decay."""
    steps = whole(rates["warmup_iter"]) if rates else 0
    if rates is None or isinstance(steps, int):
        return {"lr_warmup_fraction": None, "lr_warmup_iters": steps}
    share = config.schedule.warmup
    known = config.schedule.warmup_steps is None and share * rates["end_iter"] == steps
    return {"lr_warmup_fraction": share if known else steps / rates["end_iter"], "lr_warmup_iters": 0}


def _tokenizer_arguments(tokenizer: TokenizerConfig) -> dict[str, Any]:
    """The arguments that choose Megatron's tokenizer and name its files."""
    if tokenizer.kind == "gpt2" or tokenizer.merges:
        return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": tokenizer.path, "merge_file": tokenizer.merges}
    folder = str(Path(tokenizer.path).parent) if tokenizer.path else None
    none = {"vocab_file": None, "merge_file": None}
    return {"tokenizer_type": "PretrainedFromHF", "tokenizer_name_or_path": folder, **none}


def _arguments(
    checkpoint: Checkpoint,
    config: RunConfig,
    model: ModelConfig,
    vocab: Vocabulary,
    dtype: torch.dtype,
    train: TrainConfig,
    layout: TargetLayout,
) -> dict[str, Any]:
    """Megatron's arguments, as far as the config has their values."""
    positions = {name: number for number, name in POSITIONS.items()}
    gates = {ours: theirs for theirs, ours in GATED.items()}
    optimizer, own, rates = config.optimizer, config.schedule, schedule(checkpoint, config)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.mlp_width,
        "num_attention_heads": model.num_heads,
        "kv_channels": model.head_size,
        "max_position_embeddings": model.max_positions or config.data.seq_length,
        "make_vocab_size_divisible_by": vocab.multiple,
        "padded_vocab_size": vocab.rows,
        "layernorm_epsilon": model.norm_eps,
        "apply_residual_connection_post_layernorm": False,
        "embed_layernorm": False,
        "openai_gelu": False,
        "onnx_safe": None,
        "position_embedding_type": Instance("megatron.enums.PositionEmbeddingType", (positions[model.position],)),
        "glu_activation": gates[model.activation] if model.gated_mlp else None,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_std,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": clip_norm_of(checkpoint) or 0.0,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_eps": optimizer.eps,
        "optimizer": "adam",
        "lr": optimizer.lr,
        "lr_decay_style": own.style,
        "lr_decay_iters": rates["end_iter"] if rates else own.decay_steps,
        "lr_decay_samples": None,
        **_warmup(rates, config),
        "lr_warmup_samples": 0,
        "min_lr": own.min_lr,
        "train_iters": config.train.steps,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": train.batch_size,
        "seq_length": config.data.seq_length,
        "seed": config.seed,
        "fp16": PRECISIONS[dtype] == "fp16",
        "bf16": PRECISIONS[dtype] == "bf16",
        "params_dtype": dtype,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "data_parallel_size": layout.dp,
        "world_size": layout.tp * layout.pp * layout.dp,
        "zero_stage": layout.zero,
        "consumed_train_samples": checkpoint.progress.tokens // config.data.seq_length,
        "consumed_valid_samples": 0,
        "consumed_train_tokens": checkpoint.progress.tokens,
    }
