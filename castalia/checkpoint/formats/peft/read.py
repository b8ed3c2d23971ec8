"""Adapters as the library PEFT stores them: adapter_config.json and adapter_model.safetensors, beside no model.

Its matrices are those of the Hugging Face class. Where that has several for one of ours (queries, keys, values), ours
has one `lora_a` that all of them share, or, if theirs differ, one with the ranks of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.description import tokenizer_settings
from castalia.checkpoint.formats.huggingface import read as huggingface_read
from castalia.checkpoint.formats.huggingface.names import FAMILIES, Family, family_of, table
from castalia.checkpoint.formats.huggingface.read import has_weights, open_file, read_table
from castalia.checkpoint.rules import Chain, Op, Same, Transpose
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import LoraConfig, ModelConfig, TokenizerConfig
from castalia.config.tensor_table import ADAPTABLE, row_of
from castalia.errors import CheckpointError
from castalia.reading import expression, fits, keys, typed
from castalia.storage.lazy import InMemory, TensorRef, Zeros

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Settings that change the function in ways that low-rank products cannot. Anything but nothing is refused.
REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases in the adapters",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "single trained rows of the embedding",
    "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "adapters that switch on with a token",
    "use_qalora": "QA-LoRA's pooled inputs",
}
Scale = Annotated[float, Field(gt=0, lt=1e9)]
GIVEN = keys(
    {
        "r": Annotated[int, Field(gt=0, lt=1 << 40)],
        "lora_alpha": Scale,
        "lora_dropout": Annotated[float, Field(ge=0, lt=1)] | None,
        "base_model_name_or_path": str | None,
        "alpha_pattern": dict[Annotated[str, AfterValidator(expression)], Scale] | None,
        "use_rslora": bool | None,
    },
    required=["r", "lora_alpha"],
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initial values that are taken off the model's own


@dataclass(frozen=True)
class Matrix:
    """One of our matrices: the modules of the Hugging Face class that it is made of, and how their rows lie in it."""

    name: str
    kind: str  # attn.qkv, head, ...
    modules: tuple[str, ...]
    rows: Op
    shape: tuple[int, int]


def detect(path: Path) -> bool:
    """Whether there are adapters; a folder that only names some beside a whole model is the model's."""
    if not (path / CONFIG).is_file():
        return False
    return any((path / name).is_file() for name in WEIGHT_FILES) or not has_weights(path)


def read(path: Path, open_base: Callable[[str], Checkpoint], base: str | None = None) -> Checkpoint:
    """The adapters on their model, which `base` names if adapter_config.json does not, and `open_base` opens.

    Raises CheckpointError for what is no LoRA of that model, or a kind that we cannot hold.
    """
    config = read_table(path / CONFIG)
    _refuse(path, config)
    config = typed(config, str(path / CONFIG), CheckpointError, GIVEN)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{path / CONFIG} does not say which model it belongs to; name that with --base")
    beside = Path(name).exists() and path.samefile(name)  # the model's own files, in the adapter's folder
    model = huggingface_read.read(path) if beside else open_base(name)
    if adapters_of(model) is not None or model.config is None:
        raise CheckpointError(
            f"{path}: its model, {name}, has adapters itself; merge those first (castalia merge-lora)"
        )
    known, stored = matrices(model), _open(path, hf_family(model))
    whole = _vocabulary(path, model, stored)
    lora, tensors = _assemble(config, known, _modules(path, known, stored, str(name)), hf_family(model))
    run = model.config.with_(
        {
            "finetune.lora": lora,
            "finetune.train": tuple(f"^{name}$" for name in whole),
            "tokenizer": tokenizer_settings(model) or TokenizerConfig(),
        }
    )
    facts, held = replace(model.facts, base=model.path), {**model.model, **whole, **tensors}
    return replace(model, path=str(path), model=held, optimizer=None, config=run, facts=facts)


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    reasons = [f"{key}={config[key]!r} ({words})" for key, words in REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r} (biases of the model that were trained too)")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        reasons.append(f"init_lora_weights={config['init_lora_weights']!r} (it changed the model's own weights)")
    if kind != "LORA":
        reasons = [f"peft_type={kind!r}"]
    if reasons:
        raise CheckpointError(
            f"{path / CONFIG}: {' and '.join(reasons)} cannot be held here, only plain LoRA; merge it with PEFT "
            "(merge_and_unload) and open the model that this gives"
        )


def matrices(checkpoint: Checkpoint) -> list[Matrix]:
    """All matrices that can have adapters. Raises CheckpointError for a model that no Hugging Face class computes."""
    model = _model(checkpoint)
    family = hf_family(checkpoint)
    result = []
    for rule in table(family, model):
        name, row = rule.ours.removesuffix(".weight"), row_of(rule.ours)
        if row in ADAPTABLE:
            theirs = (each.removesuffix(".weight") for each in rule.theirs.split())
            modules = tuple(family.head_modules[0] if row.module == "head" else family.prefix + each for each in theirs)
            rows, columns = checkpoint.model[rule.ours].shape
            result.append(Matrix(name, row.module, modules, _on_rows(rule.op), (rows, columns)))
    return result


def vocabulary_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """The modules of the tensors with a row for each token: ours -> where the Hugging Face class has it."""
    family = hf_family(checkpoint)
    embedding = next(rule.theirs for rule in table(family, _model(checkpoint)) if rule.ours == "embed.weight")
    return {
        "embed.weight": family.prefix + embedding.removesuffix(".weight"),
        "head.weight": family.head_modules[0],
    }


def hf_family(checkpoint: Checkpoint) -> Family:
    """Raises CheckpointError for a model that no Hugging Face class computes."""
    if checkpoint.facts.model_type in FAMILIES:
        return FAMILIES[checkpoint.facts.model_type]
    return FAMILIES[family_of(_model(checkpoint), checkpoint.path)]


def _model(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.config is None or checkpoint.config.model is None:
        raise CheckpointError(f"{checkpoint.path} does not say which architecture its tensors belong to")
    return checkpoint.config.model


def _on_rows(op: Op) -> Op:
    """What an operation does to the rows of a matrix [out, in], and so to those of `lora_b`."""
    if isinstance(op, Chain):
        return Chain(*(each for each in op.ops if not isinstance(each, Transpose)))
    return Same() if isinstance(op, Transpose) else op


def _open(path: Path, family: Family) -> dict[str, TensorRef]:
    """All tensors, by the names that they have in the model of today's transformers."""

    def named(name: str) -> str:
        module, _, rest = name.removeprefix("base_model.model.").partition(".")
        return f"{family.head_modules[0] if module in family.head_modules else module}.{rest}"

    for file in WEIGHT_FILES:
        if (path / file).is_file():
            return {named(name): ref for name, ref in open_file(path / file).items()}
    raise CheckpointError(f"{path} has an {CONFIG} but no weights: expected {' or '.join(WEIGHT_FILES)}")


def _vocabulary(path: Path, model: Checkpoint, stored: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Embedding and head where they were trained. Takes them out; the library saves them whole, trained or not."""
    from castalia.checkpoint.compare import equal  # imports torch

    found: dict[str, TensorRef] = {}
    for ours, module in vocabulary_modules(model).items():
        for name in (f"{module}.weight", f"{module}.base_layer.weight"):
            if name not in stored or ours not in model.model:
                continue
            ref, known = stored.pop(name), model.model[ours]
            if tuple(ref.shape) != tuple(known.shape):
                raise CheckpointError(
                    f"{path} holds {name} of shape {list(ref.shape)}, its model one of {list(known.shape)}: the "
                    "vocabulary was changed; merge the adapter with PEFT"
                )
            if not equal(ref, known):
                found[ours] = ref
    return found


def _modules(
    path: Path, known: Sequence[Matrix], stored: Mapping[str, TensorRef], base: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, in fp32."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, ref in stored.items():
        matched = KEY.fullmatch(name)
        if matched is None:
            raise CheckpointError(f"{path}: {name} is no matrix of a LoRA adapter, so it cannot be held here")
        sides.setdefault(matched["module"], {})[matched["side"]] = ref.read().float()
    places = {module for matrix in known for module in matrix.modules}
    columns = {module: matrix.shape[1] for matrix in known for module in matrix.modules}
    for module, found in sides.items():
        a, b = found.get("A"), found.get("B")
        if module not in places or a is None or b is None or a.shape[1] != columns[module] or a.shape[0] != b.shape[1]:
            shapes = ", ".join(f"{side} {list(found[side].shape)}" for side in sorted(found))
            what = f"inputs of {columns[module]}" if module in places else "no such matrix"
            raise CheckpointError(
                f"{path} is an adapter of another model than {base}: it has {shapes} for {module}, where that model "
                f"has {what}. Name the right one with --base"
            )
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _assemble(
    config: Mapping[str, Any], known: Sequence[Matrix], found: Mapping[str, tuple[Tensor, Tensor]], family: Family
) -> tuple[LoraConfig, dict[str, TensorRef]]:
    """All adapters with one rank and one scale: smaller ones get zeros, which stay zero when they train on."""
    import torch

    scale = _scale(config, (), int(config["r"]))
    heads = family.head_modules
    scaled = {
        m: (a, b * (_scale(config, heads if m in heads else (m,), len(a)) / scale)) for m, (a, b) in found.items()
    }
    fused = {matrix: _fuse(matrix, scaled) for matrix in known if scaled.keys() & set(matrix.modules)}
    rank = max(len(a) for a, _ in fused.values())
    kinds = tuple(dict.fromkeys(matrix.kind for matrix in fused))
    tensors: dict[str, TensorRef] = {}
    for matrix in known:
        if matrix.kind in kinds:
            rows, columns = matrix.shape
            lora_a, lora_b = torch.zeros(rank, columns), torch.zeros(rows, rank)
            if matrix in fused:
                a, b = fused[matrix]
                lora_a[: len(a)], lora_b[:, : len(a)] = a, b
            tensors |= {f"{matrix.name}.lora_a": InMemory(lora_a), f"{matrix.name}.lora_b": InMemory(lora_b)}
    lora = LoraConfig(rank=rank, alpha=scale * rank, dropout=config.get("lora_dropout") or 0.0, targets=kinds)  # type: ignore[arg-type]
    return lora, tensors


def _scale(config: Mapping[str, Any], names: Sequence[str], rank: int) -> float:
    """What the library multiplies the product of a module of these names by."""
    patterns = (config.get("alpha_pattern") or {}).items()
    fitting = (value for key, value in patterns if any(fits(rf"^(.*\.)?({key})$", name) for name in names))
    alpha = next(fitting, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fuse(matrix: Matrix, found: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One A and B for all modules of a matrix."""
    import torch

    given = [found.get(module) for module in matrix.modules]
    firsts = [pair[0] for pair in given if pair]
    if len(firsts) == len(given) and all(torch.equal(a, firsts[0]) for a in firsts):
        sides = [pair[1] for pair in given if pair]
        return firsts[0], _rows(matrix, sides)
    ranks = [len(pair[0]) if pair else 0 for pair in given]
    sizes = _sizes(matrix)
    sides = []
    for j, pair in enumerate(given):
        side = torch.zeros(sizes[j], sum(ranks))
        if pair:
            side[:, sum(ranks[:j]) : sum(ranks[: j + 1])] = pair[1]
        sides.append(side)
    return torch.cat(firsts), _rows(matrix, sides)


def _rows(matrix: Matrix, sides: Sequence[Tensor]) -> Tensor:
    (joined,) = matrix.rows.forward([InMemory(side) for side in sides], "weight")
    return joined.read()


def _sizes(matrix: Matrix) -> list[int]:
    """Rows of each module."""
    return [ref.shape[0] for ref in matrix.rows.backward([Zeros((matrix.shape[0], 1))], "weight")]
