"""Write Hugging Face folders that `transformers` opens.

Two files more hold what `transformers` has no place for, so that reading the folder again loses nothing:
`optimizer.safetensors`, with tensors `name.exp_avg` and so on for each weight, and `castalia.json`. For the Trainer of
transformers, its own files take the place of the first; see `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from castalia.bars import unseen
from castalia.checkpoint.file_plan import (
    OutputFile,
    Plan,
    WriteOptions,
    json_output,
    json_text,
    named_groups,
    shards,
    tensors_output,
    write_bytes,
)
from castalia.checkpoint.formats.huggingface.config_json import to_config_json
from castalia.checkpoint.formats.huggingface.model_type import SCORE, Family
from castalia.checkpoint.formats.huggingface.names import FAMILIES, family_of, state_table, table
from castalia.checkpoint.formats.huggingface.read import BESIDE, CONFIG
from castalia.checkpoint.formats.huggingface.trainer import trainer_files
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.rules import MOMENTS, STATE_ROLES, Role, Rule, to_theirs
from castalia.checkpoint.sampled_values import fingerprint
from castalia.checkpoint.tensors import Checkpoint, state_tensors
from castalia.checkpoint.tokenizer_files import hf_tokenizer
from castalia.config.schema import ModelConfig
from castalia.storage.lazy import TensorRef
from castalia.storage.safetensors import open_safetensors


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files of a folder. Raises CheckpointError for a model that no class of transformers can compute."""
    model = architecture(checkpoint)
    kind = family_of(model, checkpoint.path)
    family = FAMILIES[kind]
    tokenizer, ids, notes = hf_tokenizer(checkpoint)
    weights = _named(checkpoint.model, family, table(family, model), "weight")
    config = to_config_json(kind, model, _longest(checkpoint, model), ids)
    # Recent versions of transformers call it dtype, older ones torch_dtype.
    config["torch_dtype"] = config["dtype"] = checkpoint.model["embed.weight"].dtype_name
    weight_outputs = _safetensors("model", weights, options)
    weight_files = [output.name for output in weight_outputs if output.name.endswith(".safetensors")]
    outputs = [json_output(CONFIG, config), *tokenizer, *weight_outputs]
    if options.trainer:
        files, more = trainer_files(checkpoint, family, model)
        outputs, notes = [*outputs, *files], (*notes, *more)
    else:
        outputs += _optimizer(checkpoint, family, model, options)
    if kind == "gpt_neox" and model.embedding_dropout != model.hidden_dropout:
        dropout = f"one dropout for embedding and blocks: {model.hidden_dropout}, not {model.embedding_dropout}"
        notes = (*notes, f"config.json has {dropout}")

    def finish(folder: Path, results: Mapping[str, Any]) -> None:
        """Write castalia.json, with a fingerprint of the weights: if they change, the rest no longer applies."""
        written = {name: ref for file in weight_files for name, ref in open_safetensors(folder / file).items()}
        value = {**_extras(checkpoint, not options.trainer), "fingerprint": fingerprint(written)}
        write_bytes(folder / BESIDE, json_text(value).encode(), unseen)

    return Plan(tuple(outputs), notes, finish)


def _longest(checkpoint: Checkpoint, model: ModelConfig) -> int:
    return model.max_positions or (checkpoint.config.data.seq_length if checkpoint.config else 2048)


def _named(ours: Mapping[str, TensorRef], family: Family, rules: list[Rule], role: Role) -> dict[str, TensorRef]:
    tensors = to_theirs(rules, ours, role)
    heads = (family.head, family.head.removesuffix("weight") + "bias", SCORE)
    return {name if name in heads else family.prefix + name: refs[0] for name, refs in tensors.items()}


def _safetensors(stem: str, tensors: Mapping[str, TensorRef], options: WriteOptions) -> list[OutputFile]:
    """One file, or shards and their index."""
    files = named_groups(stem, shards(tensors, options.shard_bytes))
    outputs = [tensors_output(file, group) for file, group in files.items()]
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(ref.num_bytes for ref in tensors.values())},
            "weight_map": {name: file for file, group in files.items() for name in group},
        }
        outputs.append(json_output(f"{stem}.safetensors.index.json", index))
    return outputs


def _optimizer(checkpoint: Checkpoint, family: Family, model: ModelConfig, options: WriteOptions) -> list[OutputFile]:
    """Files with Adam's moments, and with the masters unless they are the weights themselves."""
    state = checkpoint.optimizer
    if state is None:
        return []
    has_masters = any(entry["master"] != checkpoint.model[name] for name, entry in state.items())
    rules = state_table(family, model)
    tensors: dict[str, TensorRef] = {}
    for role in STATE_ROLES if has_masters else MOMENTS:
        ours = {name: state_tensors(entry)[role] for name, entry in state.items()}
        tensors |= {f"{name}.{role}": ref for name, ref in _named(ours, family, rules, role).items()}
    return _safetensors("optimizer", tensors, options)


def _extras(checkpoint: Checkpoint, stateful: bool) -> dict[str, Any]:
    """The content of castalia.json, but for the fingerprint. `stateful`: the optimizer state lies beside it."""
    state = checkpoint.optimizer if stateful else None
    return {
        "progress": asdict(checkpoint.progress),
        "optimizer_steps": None if state is None else {name: entry["step"] for name, entry in state.items()},
        **checkpoint.inherited,
        "config": checkpoint.config.model_dump(mode="json") if checkpoint.config else None,
    }
