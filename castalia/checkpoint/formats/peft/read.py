"""Read LoRA adapters as the library PEFT stores them: adapter_config.json and adapter_model.safetensors, no model.

PEFT's modules are those of the Hugging Face class. Where several of them are one matrix of ours (queries, keys,
values), our adapter has the common `lora_a` if they share it; otherwise its rank is the sum of their ranks.
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
from castalia.checkpoint.formats.huggingface import trainer
from castalia.checkpoint.formats.huggingface.model_type import SCORE, Family
from castalia.checkpoint.formats.huggingface.names import FAMILIES, family_of, table
from castalia.checkpoint.formats.huggingface.read import has_weights, open_file, read_table
from castalia.checkpoint.rules import Chain, Op, Same, Transpose
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import LoraConfig, ModelConfig, TokenizerConfig
from castalia.config.tensor_table import row_of
from castalia.errors import CheckpointError
from castalia.reading import expression, fits, keys, typed
from castalia.storage.lazy import InMemory, TensorRef, Zeros

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Settings that change the function in ways that low-rank products cannot express. Any true value is refused.
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
CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # kinds of initial values that were subtracted from the model's weights


@dataclass(frozen=True)
class Matrix:
    """One of our matrices: the modules of the Hugging Face class that it consists of, and how their rows lie in it."""

    name: str
    kind: str  # attn.qkv, head, ...
    modules: tuple[str, ...]
    rows: Op
    shape: tuple[int, int]


def detect(path: Path) -> bool:
    """Whether a folder has adapters. One with a whole model and only an adapter_config.json counts as the model's."""
    if not (path / CONFIG).is_file():
        return False
    return any((path / name).is_file() for name in WEIGHT_FILES) or not has_weights(path)


def read(path: Path, open_base: Callable[[str], Checkpoint], base: str | None = None) -> Checkpoint:
    """The adapters on their model, which `base` names if adapter_config.json does not, and `open_base` opens.

    Raises CheckpointError for adapters of another model, and for kinds of adapters that ours cannot express.
    """
    config = read_table(path / CONFIG)
    _refuse(path, config)
    config = typed(config, str(path / CONFIG), CheckpointError, GIVEN)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{path / CONFIG} does not say which model it belongs to; name that with --base")
    same_folder = Path(name).exists() and path.samefile(name)  # the model's files lie in the adapter's folder
    model = huggingface_read.read(path) if same_folder else open_base(name)
    if adapters_of(model) is not None or model.config is None:
        raise CheckpointError(
            f"{path}: its model, {name}, has adapters itself; merge those first (castalia merge-lora)"
        )
    stored = _open(path, hf_family(model))
    model, head = _reward_head(path, config, model, stored.pop(SCORE, None))
    assert model.config is not None
    known, whole = matrices(model), _vocabulary(path, model, stored) | head
    lora, tensors = _assemble(config, known, _modules(path, known, stored, str(name)), hf_family(model))
    run = model.config.with_(
        {
            "finetune.lora": lora,
            "finetune.train": tuple(f"^{name}$" for name in whole),
            "tokenizer": huggingface_read.own_tokenizer(path) or tokenizer_settings(model) or TokenizerConfig(),
        }
    )
    facts, held = replace(model.facts, base=model.path), {**model.model, **whole, **tensors}
    note = trainer.unread("it is of adapters") if (path / trainer.OPTIMIZER).is_file() else ""
    return replace(
        model,
        path=str(path),
        model=held,
        optimizer=None,
        config=run,
        facts=facts,
        progress=trainer.read_run(path).progress or model.progress,
        state_notes=(note,) if note else model.state_notes,
    )


def _reward_head(
    path: Path, config: Mapping[str, Any], model: Checkpoint, score: TensorRef | None
) -> tuple[Checkpoint, dict[str, TensorRef]]:
    """The model that the adapters belong to, and the head that they bring, which makes it a reward model.

    Raises CheckpointError for a classifier of several classes, and for adapters of a classifier without its head.
    """
    assert model.config is not None
    if score is None:
        if config.get("task_type") == "SEQ_CLS" and "reward.weight" not in model.model:
            raise CheckpointError(
                f"{path} holds adapters of a reward model (task_type SEQ_CLS), but neither it nor {model.path} holds "
                f'{SCORE}: it was not saved, for which PEFT needs modules_to_save=["score"]'
            )
        return model, {}
    if score.shape[0] != 1:
        raise CheckpointError(
            f"{path}: {SCORE} has {score.shape[0]} rows, so that this model sorts texts into classes; only reward "
            "models, with one row, are supported"
        )
    tensors = {name: ref for name, ref in model.model.items() if name != "head.weight"}
    return replace(model, model=tensors, config=model.config.with_({"model.reward_head": True})), {
        "reward.weight": score
    }


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for adapters other than plain LoRA."""
    kind = config.get("peft_type")
    reasons = [f"{key}={config[key]!r} ({what})" for key, what in REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r} (biases of the model that were trained too)")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        reasons.append(f"init_lora_weights={config['init_lora_weights']!r} (it changed the model's own weights)")
    if kind != "LORA":
        reasons = [f"peft_type={kind!r}"]
    if reasons:
        raise CheckpointError(
            f"{path / CONFIG}: {' and '.join(reasons)} cannot be read, only plain LoRA; merge it with PEFT "
            "(merge_and_unload) and open the model that this gives"
        )


def matrices(checkpoint: Checkpoint) -> list[Matrix]:
    """All matrices that can have adapters. Raises CheckpointError if no Hugging Face class can compute the model, or
    one with blocks without attention, whose modules are not matched to ours."""
    model = _model(checkpoint)
    family = hf_family(checkpoint)
    if model.other_kinds:
        raise CheckpointError(
            f"{checkpoint.path}: adapters on {' and '.join(model.other_kinds)} blocks are neither read nor written in "
            "PEFT's layout; merge them (castalia merge-lora, or merge_and_unload of PEFT)"
        )
    result = []
    for rule in table(family, model):
        name, row = rule.ours.removesuffix(".weight"), row_of(rule.ours)
        if row.adaptable:
            names = (weight.removesuffix(".weight") for weight in rule.theirs.split())
            modules = tuple(family.head_modules[0] if row.module == "head" else family.prefix + n for n in names)
            rows, columns = checkpoint.model[rule.ours].shape
            result.append(Matrix(name, row.module, modules, _on_rows(rule.op), (rows, columns)))
    return result


def vocabulary_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """The modules that hold the tensors with a row for each token, by our names of the tensors."""
    family = hf_family(checkpoint)
    embedding = next(rule.theirs for rule in table(family, _model(checkpoint)) if rule.ours == "embed.weight")
    return {
        "embed.weight": family.prefix + embedding.removesuffix(".weight"),
        "head.weight": family.head_modules[0],
    }


def hf_family(checkpoint: Checkpoint) -> Family:
    """The family of the Hugging Face class that computes the model. Raises CheckpointError if none can."""
    if checkpoint.facts.model_type in FAMILIES:
        return FAMILIES[checkpoint.facts.model_type]
    return FAMILIES[family_of(_model(checkpoint), checkpoint.path)]


def _model(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.config is None or checkpoint.config.model is None:
        raise CheckpointError(f"{checkpoint.path} does not say which architecture its tensors belong to")
    return checkpoint.config.model


def _on_rows(op: Op) -> Op:
    """The part of an operation that rearranges rows of a matrix [out, in]; it applies to `lora_b` [out, rank] too."""
    if isinstance(op, Chain):
        return Chain(*(inner for inner in op.ops if not isinstance(inner, Transpose)))
    return Same() if isinstance(op, Transpose) else op


def _open(path: Path, family: Family) -> dict[str, TensorRef]:
    """All tensors, by their names in the model of transformers 5."""

    def current_name(name: str) -> str:
        """The name without PEFT's prefix, and with the head's current name."""
        module, _, rest = name.removeprefix("base_model.model.").partition(".")
        return f"{family.head_modules[0] if module in family.head_modules else module}.{rest}"

    for file in WEIGHT_FILES:
        if (path / file).is_file():
            return {current_name(name): ref for name, ref in open_file(path / file).items()}
    raise CheckpointError(f"{path} has an {CONFIG} but no weights: expected {' or '.join(WEIGHT_FILES)}")


def _vocabulary(path: Path, model: Checkpoint, stored: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Embedding and head if they were trained, by our names. Both are removed from `stored`.

    PEFT saves them whole, trained or not. Raises CheckpointError if the vocabulary was resized.
    """
    from castalia.checkpoint.compare import equal  # imports torch

    trained: dict[str, TensorRef] = {}
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
                trained[ours] = ref
    return trained


def _modules(
    path: Path, known: Sequence[Matrix], stored: Mapping[str, TensorRef], base: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of every module, in fp32.

    Raises CheckpointError for tensors that fit no module of the model.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, ref in stored.items():
        matched = KEY.fullmatch(name)
        if matched is None:
            raise CheckpointError(f"{path}: {name} is not a matrix of a LoRA adapter, so this adapter cannot be read")
        sides.setdefault(matched["module"], {})[matched["side"]] = ref.read().float()
    places = {module for matrix in known for module in matrix.modules}
    columns = {module: matrix.shape[1] for matrix in known for module in matrix.modules}
    for module, pair in sides.items():
        a, b = pair.get("A"), pair.get("B")
        if module not in places or a is None or b is None or a.shape[1] != columns[module] or a.shape[0] != b.shape[1]:
            shapes = ", ".join(f"{side} {list(pair[side].shape)}" for side in sorted(pair))
            what = f"inputs of {columns[module]}" if module in places else "no such matrix"
            raise CheckpointError(
                f"{path} is an adapter of another model than {base}: it has {shapes} for {module}, where that model "
                f"has {what}. Name the right one with --base"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _assemble(
    config: Mapping[str, Any], known: Sequence[Matrix], adapters: Mapping[str, tuple[Tensor, Tensor]], family: Family
) -> tuple[LoraConfig, dict[str, TensorRef]]:
    """All adapters with one rank and one scale. Smaller ones are padded with zeros, which stay zero in training."""
    import torch

    scale = _scale(config, (), int(config["r"]))  # of all; other scales are multiplied into B
    heads = family.head_modules
    scaled = {
        m: (a, b * (_scale(config, heads if m in heads else (m,), len(a)) / scale)) for m, (a, b) in adapters.items()
    }
    fused = {matrix: _fuse(matrix, scaled) for matrix in known if scaled.keys() & set(matrix.modules)}
    rank = max(len(a) for a, _ in fused.values())
    kinds = tuple(dict.fromkeys(matrix.kind for matrix in fused))
    tensors: dict[str, TensorRef] = {}
    for matrix in known:
        if matrix.kind in kinds:
            rows, columns = matrix.shape
            # Every matrix of a kind has adapters; those that PEFT has none for get zeros.
            lora_a, lora_b = torch.zeros(rank, columns), torch.zeros(rows, rank)  # [rank, in], [out, rank]
            if matrix in fused:
                a, b = fused[matrix]
                lora_a[: len(a)], lora_b[:, : len(a)] = a, b
            tensors |= {f"{matrix.name}.lora_a": InMemory(lora_a), f"{matrix.name}.lora_b": InMemory(lora_b)}
    lora = LoraConfig(rank=rank, alpha=scale * rank, dropout=config.get("lora_dropout") or 0.0, targets=kinds)  # type: ignore[arg-type]
    return lora, tensors


def _scale(config: Mapping[str, Any], names: Sequence[str], rank: int) -> float:
    """The factor that PEFT multiplies B A by, for a module that has any of these names."""
    patterns = (config.get("alpha_pattern") or {}).items()
    fitting = (value for key, value in patterns if any(fits(rf"^(.*\.)?({key})$", name) for name in names))
    alpha = next(fitting, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fuse(matrix: Matrix, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One A and one B for all modules of a matrix.

    Modules with different A get the stacked A [sum of ranks, in] and a block-diagonal B [out, sum of ranks].
    """
    import torch

    given = [adapters.get(module) for module in matrix.modules]
    firsts = [pair[0] for pair in given if pair]
    # The usual case: our own adapters, written for PEFT, repeat A for each module.
    if len(firsts) == len(given) and all(torch.equal(a, firsts[0]) for a in firsts):
        sides = [pair[1] for pair in given if pair]
        return firsts[0], _rows(matrix, sides)
    ranks = [len(pair[0]) if pair else 0 for pair in given]
    sizes = _sizes(matrix)
    sides = []  # of each module: [its rows, sum of ranks], zero but for its own columns
    for j, pair in enumerate(given):
        side = torch.zeros(sizes[j], sum(ranks))
        if pair:
            side[:, sum(ranks[:j]) : sum(ranks[: j + 1])] = pair[1]
        sides.append(side)
    return torch.cat(firsts), _rows(matrix, sides)


def _rows(matrix: Matrix, sides: Sequence[Tensor]) -> Tensor:
    """The modules' rows of B in the order of our matrix."""
    (joined,) = matrix.rows.forward([InMemory(side) for side in sides], "weight")
    return joined.read()


def _sizes(matrix: Matrix) -> list[int]:
    """The number of rows of each module."""
    return [ref.shape[0] for ref in matrix.rows.backward([Zeros((matrix.shape[0], 1))], "weight")]
