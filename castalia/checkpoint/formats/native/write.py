"""Write checkpoints of other formats as Castalia's own. (A training run saves with `save.CheckpointSaver`.)

The fp32 masters are stored as the model's tensors. The manifest notes the dtype of 16-bit weights, which are masters
rounded. Weights that are not (averages over ranks that drifted apart, for instance) are stored as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castalia.bars import Tally, unseen
from castalia.checkpoint.file_plan import OutputFile, Plan, WriteOptions, shards
from castalia.checkpoint.formats.native.save import describe, write_chunk, write_manifest
from castalia.checkpoint.tensors import Checkpoint, state_tensors
from castalia.checkpoint.tokenizer_files import FOLDER, our_tokenizer
from castalia.config.schema import TokenizerConfig
from castalia.storage.derived import RoundingProbe
from castalia.storage.lazy import TensorRef
from castalia.storage.safetensors import DTYPE_CODES


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files of a step's folder. The tokenizer lies in `tokenizer/`."""
    state = checkpoint.optimizer or {}
    rounded = {name for name in state if state[name]["master"] != checkpoint.model[name]}  # weights are not masters
    model: dict[str, TensorRef] = {
        name: RoundingProbe(state[name]["master"], ref) if name in rounded else ref
        for name, ref in checkpoint.model.items()
    }
    moments: dict[str, TensorRef] = {
        f"{name}.{kind}": ref
        for name, entry in state.items()
        for kind, ref in state_tensors(entry).items()
        if kind != "master"
    }
    parts = [
        _part(kind, rank, group)
        for kind, tensors in (("model", model), ("optimizer", moments))
        for rank, group in enumerate(shards(tensors, options.shard_bytes) if tensors else [])
    ]
    tokenizer, notes = our_tokenizer(checkpoint)
    config = checkpoint.config
    if config and not notes:  # the copy is used even if the source is moved
        config = config.with_({"tokenizer": TokenizerConfig(path=FOLDER)})
    facts = checkpoint.facts
    about = describe(checkpoint.progress, config, facts.data_fingerprint or "", facts.held_out)
    about |= {
        "optimizer_steps": None
        if checkpoint.optimizer is None
        else {name: entry["step"] for name, entry in state.items()},
        "rounded_weights": {name: DTYPE_CODES[checkpoint.model[name].dtype_name] for name in sorted(rounded)},
        **checkpoint.inherited,
    }

    def finish(folder: Path, results: Mapping[str, Any]) -> None:
        """Store the weights that turned out not to be masters rounded, and write the manifest."""
        entries = [results[part.name]["entries"] for part in parts]
        if different := [name for part in parts for name in results[part.name]["not_rounded"]]:
            weights = {name: checkpoint.model[name] for name in different}
            file = "weights-00000.safetensors"
            entries.append({"weights": write_chunk(folder / file, file, weights, unseen)})
        write_manifest(folder, about, entries)

    return Plan((*parts, *tokenizer), notes, finish)


def _part(kind: str, rank: int, tensors: Mapping[str, TensorRef]) -> OutputFile:
    name = f"{kind}-{rank:05d}.safetensors"

    def write(path: Path, advance: Tally) -> dict:
        """Write the file. Returns its manifest entries, and the weights that are not their masters rounded."""
        entries = {kind: write_chunk(path, name, tensors, advance)}
        different = [name for name, ref in tensors.items() if isinstance(ref, RoundingProbe) and not ref.rounds]
        return {"entries": entries, "not_rounded": different}

    return OutputFile(name, sum(ref.num_bytes for ref in tensors.values()), write, tuple(tensors.values()))
