"""Write RWKV's own file, for programs that run RWKV-6 models."""

from __future__ import annotations

from dataclasses import replace

from castalia.checkpoint.file_plan import OutputFile, Plan, WriteOptions
from castalia.checkpoint.formats.rwkv.names import COPIED, FIRST_NORM, table
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.rules import to_theirs
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef
from castalia.storage.pt_writer import PtFile

HOLDS = {"norm": ("layernorm",), "norm_eps": (1e-5,), "position": ("none", "rotary", "alibi"), "reward_head": (False,)}
AFTER = "blocks.0.ln2.bias"  # what the norm of the embedding follows


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The file. Raises CheckpointError that names what RWKV's models do not have."""
    model = architecture(checkpoint)
    assert checkpoint.config is not None
    if lacking := list(_lacking(model, checkpoint.config.neox_exact)):
        raise CheckpointError(f"{checkpoint.path}: RWKV's own files cannot hold {', '.join(lacking)}")
    notes, ours = [], dict(checkpoint.model)
    if model.tie_embeddings:
        ours["head.weight"] = ours["embed.weight"]
        notes.append("RWKV's models have a head of their own: the embedding is written twice")
        model = model.with_({"tie_embeddings": False})
    theirs = {name: refs[0] for name, refs in to_theirs(table(model), ours).items()}
    # Without a norm of its own block 0 takes its first norm twice, which is the same.
    source = FIRST_NORM if model.embedding_norm else COPIED
    first = {f"{FIRST_NORM}.{part}": theirs[f"{source}.{part}"] for part in ("weight", "bias")}
    ordered: dict[str, TensorRef] = {}
    for name, ref in theirs.items():
        if name not in first:
            ordered[name] = ref
        if name == AFTER:
            ordered |= first
    file = PtFile(ordered)
    title = options.folder.stem if options.folder else "model"
    output = OutputFile(
        "model.pth", file.num_bytes, lambda path, advance: file.write(path, title, advance), file.tensors
    )
    config = checkpoint.config.with_({"model": model})
    return Plan((output,), tuple(notes), file=True, held=replace(checkpoint, model=ours, optimizer=None, config=config))


def _lacking(model: ModelConfig, exact: bool) -> list[str]:
    """Settings of a model that RWKV's own do not have."""
    values = {key: getattr(model, key) for key in HOLDS}
    found = [f"model.{key}={values[key]}" for key, allowed in HOLDS.items() if values[key] not in allowed]
    if kinds := sorted(set(model.layer_kinds) - {"rwkv"}):
        found.append(f"{' and '.join(kinds)} blocks (model.pattern)")
    if (model.rwkv_over or ("batch" if exact else "time")) == "batch":
        found.append("blocks that mix over the batch (model.rwkv_over or neox_exact)")
    return found
