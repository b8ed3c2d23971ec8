"""Write NeoX's folders of both eras, with and without pipeline files, for any number of ranks.

NeoX loads them and continues: they have weights, masters, moments, counters, learning-rate schedule and config. States
of random generators are left out, as with NeoX's option `no_save_rng`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from castalia.checkpoint.file_plan import Plan, WriteOptions, bytes_output, pt_output
from castalia.checkpoint.formats.deepspeed.write import (
    DeepSpeedFolder,
    Group,
    adam_steps,
    counters,
    cut_stages,
    kind_of,
    model_state,
    state_of,
    weights_of,
)
from castalia.checkpoint.formats.neox.names import HEAD, LEGACY, NORM_PARAMETERS, neox_qkv, table
from castalia.checkpoint.formats.neox.written_config import (
    NeoXTarget,
    adapted,
    deepspeed_config,
    loss_scaler,
    next_rate,
    schedule,
)
from castalia.checkpoint.neox_defects import micro_batches_note, with_micro_batches
from castalia.checkpoint.rules import STATE_ROLES, Role, Rule, to_theirs
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.tokenizer_files import our_tokenizer, written_tokenizer
from castalia.config.neox.write import TOKENIZER_TYPES
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import row_of
from castalia.config.yaml_files import to_yaml
from castalia.model.positions import alibi_slopes
from castalia.storage.derived import Padded
from castalia.storage.lazy import InMemory, TensorRef
from castalia.storage.pt_writer import Named, Size


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files of a step's folder. Raises CheckpointError for what NeoX cannot hold."""
    source, (tokenizer, notes) = checkpoint, our_tokenizer(checkpoint)
    target = adapted(checkpoint, options, written_tokenizer(checkpoint, tokenizer, options.folder))
    sums = options.era == "head" and options.layout.pp > 0  # DeepSpeed's pipeline engine does
    micro_batches = (target.config.train.accumulation or 1) if sums else 1
    checkpoint = with_micro_batches(checkpoint, micro_batches)
    job = _job(checkpoint, target, options)
    outputs = [bytes_output("configs/config.yml", to_yaml(target.keys)), *tokenizer]
    outputs += job.layer_files() if job.pipeline else []
    for number, stage, rank in job.model_ranks():
        groups = job.parameter_groups(stage, rank, checkpoint.path)
        state = _model_state(job, checkpoint, target, groups, rank, options.era)
        beside = _beside_optimizer(job, state, stage, rank)
        outputs.append(pt_output(f"mp_rank_{number:02d}_model_states.pt", state))
        outputs += job.optimizer_files(number, groups, beside)
    return Plan(tuple(outputs), (*target.notes, *filter(None, (micro_batches_note(source, micro_batches),)), *notes))


def _job(checkpoint: Checkpoint, target: NeoXTarget, options: WriteOptions) -> DeepSpeedFolder:
    model, layout, state = target.model, options.layout, checkpoint.optimizer
    # Where both branches share a norm, NeoX has a second one that it never uses.
    stored = model.with_({"shared_norm": False})
    rules = table(HEAD if options.era == "head" else LEGACY, stored, layout.tp, neox_qkv(model, layout.tp, "new"))
    kind = kind_of(target.dtype, layout.zero, options.era) if state else None
    weights = _theirs(rules, weights_of(checkpoint, kind), "weight", target)
    tensors: dict[Role, Mapping[str, Sequence[TensorRef]]]
    tensors = {"weight": _with_buffers(weights, model, layout.tp, options.era, target.dtype)}
    for role in STATE_ROLES if state else ():
        tensors[role] = _theirs(rules, state_of(checkpoint, role), role, target)
    layers = [
        0,
        1,
        *[1] * model.num_layers,
        1,
        0,
        0,
    ]  # how NeoX weighs its layers when it balances stages; functions around blocks count
    return DeepSpeedFolder(
        layout=layout,
        kind=kind,
        tensors=tensors,
        steps=adam_steps(checkpoint, rules),
        stages=cut_stages(layers, layout.pp, options.era) if layout.pp else [range(len(layers))],
        tied="0." if model.tie_embeddings else "",
        groups=_group_settings(checkpoint, target, options.era),
        scaler=loss_scaler(checkpoint, target.config, target.dtype, options.era),
        clip=target.clip,
    )


def padded(ours: Mapping[str, TensorRef], rows: int) -> dict[str, TensorRef]:
    """The tensors with the vocabulary padded to this many rows of zeros."""
    return {
        name: Padded(ref, rows) if row_of(name).has_token_rows and ref.shape[0] < rows else ref
        for name, ref in ours.items()
    }


def _theirs(
    rules: Sequence[Rule], ours: Mapping[str, TensorRef], role: Role, target: NeoXTarget
) -> Mapping[str, Sequence[TensorRef]]:
    """NeoX's tensors of one role, with its padding of the vocabulary, and with the norms that it never uses."""
    model, all_ours = target.model, padded(ours, target.vocabulary.rows)
    if model.has_one_norm:
        dtype = target.dtype if role == "weight" else torch.float32
        for kind in NORM_PARAMETERS[model.norm]:
            initial = 1.0 if kind == "weight" and role in ("weight", "master") else 0.0
            for block in (i for i, made in enumerate(model.layer_kinds) if made in ("dense", "moe")):
                size = ours[f"blocks.{block}.norm1.{kind}"].shape
                all_ours[f"blocks.{block}.norm2.{kind}"] = InMemory(torch.full(size, initial, dtype=dtype))
    return to_theirs(rules, all_ours, role)


def _with_buffers(
    weights: Mapping[str, Sequence[TensorRef]], model: ModelConfig, tp: int, era: str, dtype: torch.dtype
) -> dict[str, Sequence[TensorRef]]:
    """The weights, with the derived tensors that NeoX expects among them."""
    buffers: dict[str, Sequence[TensorRef]] = {}
    if model.position == "rotary" and era == "v1":
        frequencies = _frequencies(model.rotary_base, model.rotary_size).to(dtype)
        buffers["attention.rotary_emb.inv_freq"] = [InMemory(frequencies)] * tp
    elif model.position == "alibi":
        slopes = torch.tensor(alibi_slopes(model.num_heads), dtype=dtype)
        buffers["attention.alibi_embed.slopes"] = [InMemory(part) for part in slopes.chunk(tp)]
    result: dict[str, Sequence[TensorRef]] = {}
    for name, refs in weights.items():
        if name.endswith(".attention.dense.weight"):  # the buffers come before it in the order of modules
            result |= {f"{name.partition('.')[0]}.{buffer}": parts for buffer, parts in buffers.items()}
        result[name] = refs
        if name == "0.word_embeddings.weight" and model.position == "sinusoidal":
            frequencies = _frequencies(10000.0, model.hidden_size).to(dtype)
            result["0.position_embeddings.inv_freq"] = [InMemory(frequencies)] * tp
    return result


def _frequencies(base: float, size: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, size, 2).float() / size))


def _group_settings(checkpoint: Checkpoint, target: NeoXTarget, era: str) -> list[dict[str, Any]]:
    """The entries of `param_groups`: one for each parameter group, without weight decay last."""
    optimizer, state = target.config.optimizer, schedule(checkpoint, target.config)
    common = {
        "lr": next_rate(state, era) if state else optimizer.lr,
        "bias_correction": True,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "step": 0,
    }
    if era == "v1" and checkpoint.optimizer:  # the first release continues with this step
        common["step"] = max(state["step"] for state in checkpoint.optimizer.values())
    groups = [{"name": "no_weight_decay_params", "weight_decay": 0.0, **common}]
    if optimizer.weight_decay:
        groups.insert(0, {"name": "weight_decay_params", "weight_decay": optimizer.weight_decay, **common})
    return [{key: value for key, value in group.items() if era == "head" or key != "name"} for group in groups]


def _model_state(
    job: DeepSpeedFolder, checkpoint: Checkpoint, target: NeoXTarget, groups: Sequence[Group], rank: int, era: str
) -> dict[str, Any]:
    """The content of an `mp_rank` file."""
    config, progress = target.config, checkpoint.progress
    rates = schedule(checkpoint, config)
    state: dict[str, Any]
    if era == "head":
        given = deepspeed_config(target.keys, config)
        state = model_state(job, groups, rank, progress, config.data.seq_length, rates, given)
    else:
        state = {"module": job.module(rank), "optimizer": job.optimizer(groups), "lr_scheduler": rates}
        state |= {"csr_tensor_module_names": set(), **counters(job, progress, config.data.seq_length)}
    return state | {"iteration": progress.step, "args": _arguments(target, job.layout.tp)}


def _arguments(target: NeoXTarget, tp: int) -> dict[str, Any]:
    """The arguments that NeoX compares with its config when it loads a checkpoint."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    return {name: target.keys[name] for name in names} | {
        "make_vocab_size_divisible_by": target.keys["make_vocab_size_divisible_by"],
        "padded_vocab_size": target.vocabulary.rows,
        "tokenizer_type": target.keys.get("tokenizer_type", TOKENIZER_TYPES["gpt2"]),
        "model_parallel_size": tp,
    }


def _beside_optimizer(job: DeepSpeedFolder, state: Mapping[str, Any], stage: int, rank: int) -> dict[str, Any]:
    """The entries of an optimizer file besides the state."""
    if job.kind == "old":  # in the order of the modules
        names = job.parameters(stage).items()
        return {"param_shapes": Named({name: Size(job.tensors["master"][own][rank].shape) for name, own in names})}
    return {key: state[key] for key in ("ds_config", "ds_version") if key in state}
