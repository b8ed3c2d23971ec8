"""The architecture of a checkpoint: what its tensors show, and what configs add or contradict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from castalia.checkpoint.formats import FORMATS
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import LayerKind, shortest
from castalia.storage.lazy import TensorRef

# Shown where they are not as in most models.
CHANGED = (
    "head_size",
    "norm_placement",
    "zero_centered_norms",
    "out_bias",
    "attention_scale",
    "clip_qkv",
    "attention_softcap",
    "head_bias",
    "logit_softcap",
    "rotary_pattern",
    "window_pattern",
    "position_offset",
    "embedding_norm",
    "embedding_multiplier",
)
SHOWN = (
    "num_layers", "hidden_size", "num_heads", "kv_heads", "mlp_width", "padded_vocab_size", "max_positions", "position",
    "rotary_pct", "rotary_base", "norm", "norm_eps", "rms_eps_inside", "qk_norm", "activation", "gated_mlp",
    "parallel_residual", "shared_norm", "attention_bias", "mlp_bias", "tie_embeddings", "sliding_window", "pattern",
    "amlp_size", *CHANGED,
)  # fmt: skip
MARKS: dict[str, LayerKind] = {
    ".gmlp.": "gmlp",
    ".gmlp.attn.": "amlp",
    ".mamba.": "mamba",
    ".rwkv.": "rwkv",
}  # of tensors of blocks without attention
SETTINGS = {  # what sets them
    "kv_heads": "num_kv_heads", "mlp_width": "mlp_size", "padded_vocab_size": "vocab_size", "head_size": "head_dim",
    "out_bias": "attention_out_bias",
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A setting of the model and where its value comes from: "tensors", a file and line, "guess"."""

    value: Any
    source: str


def from_tensors(tensors: Mapping[str, TensorRef], num_heads: int | None) -> dict[str, Any]:
    """The properties of `ModelConfig` that canonical tensors show.

    `num_heads`: from the config; tensors show the number of heads only if each head has a norm (`qk_norm`).
    """
    shapes = {name: tuple(ref.shape) for name, ref in tensors.items()}
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    facts: dict[str, Any] = {"num_layers": len(blocks), "tie_embeddings": "head.weight" not in shapes}
    if "reward.weight" in shapes:  # a reward model has no other head, so its absence shows nothing
        del facts["tie_embeddings"]
    matrices = {
        name: shape for name, shape in shapes.items() if len(shape) == 2
    }  # other shapes belong to a damaged file
    if "embed.weight" in matrices:
        facts["padded_vocab_size"], facts["hidden_size"] = matrices["embed.weight"]
    if "positions.weight" in matrices:
        facts |= {"position": "learned", "max_positions": matrices["positions.weight"][0]}
    if not blocks:
        return facts
    others = {int(name.split(".")[1]): kind for mark, kind in MARKS.items() for name in shapes if mark in name}
    facts["pattern"] = shortest([others.get(i, "attention") for i in range(len(blocks))])
    facts["norm"] = _norm(shapes)
    facts["embedding_norm"] = "embed_norm.weight" in shapes
    # Where some blocks have no attention, the others show what it is.
    attending = [name.removesuffix("attn.qkv.weight") for name in shapes if name.endswith(".attn.qkv.weight")]
    attending = [name for name in attending if name.count(".") == 2]  # aMLP has one of its own
    if not attending and others:
        return facts
    own = min(attending, default="blocks.0.")
    block = {name.removeprefix(own): shape for name, shape in shapes.items() if name.startswith(own)}
    matrices = {name: shape for name, shape in block.items() if len(shape) == 2}
    facts |= {"attention_bias": "attn.qkv.bias" in block, "out_bias": "attn.out.bias" in block}
    if "attn.q_norm.weight" not in block:  # which of the kinds it is, it does not show
        facts["qk_norm"] = "attn.qk_norm.weight" in block
    if facts["norm"] != "layernorm_no_params":
        facts["norm_placement"] = (
            "before" if "norm2_out.weight" not in block else "both" if "norm1.weight" in block else "after"
        )
    # Where some blocks have experts, the others show what an MLP is.
    dense = [name.removesuffix("mlp.down.weight") for name in shapes if name.endswith(".mlp.down.weight")]
    if dense or "mlp.router.weight" not in block:
        first = dense[0] if dense else "blocks.0."
        facts |= {"gated_mlp": f"{first}mlp.gate.weight" in shapes, "mlp_bias": f"{first}mlp.up.bias" in shapes}
        if dense and len(shapes[f"{first}mlp.down.weight"]) == 2:
            facts["mlp_width"] = shapes[f"{first}mlp.down.weight"][1]
    if "attn.qk_norm.weight" in matrices:
        num_heads = facts["num_heads"] = matrices["attn.qk_norm.weight"][0]
    size = matrices["attn.out.weight"][1] // num_heads if num_heads and "attn.out.weight" in matrices else 0
    if size and "attn.qkv.weight" in matrices:
        # the fused matrix has (heads + 2 * kv_heads) * head_size rows
        facts["head_size"] = size
        facts["kv_heads"] = (matrices["attn.qkv.weight"][0] // size - (num_heads or 0)) // 2
    return facts


def _norm(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of the last norm, which blocks have, too, unless theirs is always the same."""
    if "norm.weight" not in shapes:
        return "layernorm_no_params"
    if "norm.bias" in shapes:
        return "layernorm"
    return "scalenorm" if shapes["norm.weight"] == (1,) else "rmsnorm"


def architecture(checkpoint: Checkpoint) -> tuple[dict[str, Fact], list[str]]:
    """The model's settings, each with its source, and a line for each setting in which config and tensors disagree."""
    model = checkpoint.config.model if checkpoint.config else None
    shown = from_tensors(checkpoint.model, model.num_heads if model else None)
    facts = {name: Fact(shown[name], "tensors") for name in SHOWN if name in shown}
    differences = list(checkpoint.facts.disagreements)
    if model is not None:
        for name in SHOWN:
            value = None if name == "padded_vocab_size" and model.vocab_size is None else getattr(model, name)
            if name == "pattern":
                value = shortest([model.pattern[i % len(model.pattern)] for i in range(model.num_layers)])
            if name not in facts:
                facts[name] = Fact(value, _source(checkpoint, name))
            elif value is not None and value != facts[name].value:
                differences.append(
                    f"{name}: {facts[name].value} in the tensors, {value} in {_source(checkpoint, name)}"
                )
    order = [name for name in SHOWN if name in facts and _matters(name, facts)]
    return {name: facts[name] for name in order}, differences


def _matters(name: str, facts: Mapping[str, Fact]) -> bool:
    """Whether a setting has an effect in this model."""

    def value(of: str) -> Any:
        """The value of another setting; None if it is unknown."""
        return facts[of].value if of in facts else None

    uses = {
        "rotary_pct": value("position") == "rotary",
        "rotary_base": value("position") == "rotary",
        "rms_eps_inside": value("norm") == "rmsnorm",
        "shared_norm": value("shared_norm"),
        "qk_norm": value("qk_norm"),
        "sliding_window": value("sliding_window"),
        "embedding_norm": value("embedding_norm"),
        "pattern": value("pattern") != ("attention",),
        "amlp_size": "amlp" in (value("pattern") or ()),
        "activation": not set(value("pattern") or ("attention",)) <= {"mamba", "rwkv"},
    }
    usual = {
        "head_size": (value("hidden_size") or 0) // (value("num_heads") or 1), "norm_placement": "before",
        "out_bias": value("attention_bias"), "rotary_pattern": (True,), "window_pattern": (True,),
        "embedding_multiplier": 1.0,
    }  # fmt: skip
    uses |= {name: bool(value(name)) and value(name) != usual.get(name, False) for name in CHANGED}
    uses["out_bias"] = value("out_bias") != value("attention_bias")
    if "attention" not in (value("pattern") or ("attention",)):
        uses |= dict.fromkeys(("num_heads", "kv_heads", "mlp_width", "gated_mlp", "attention_bias", "mlp_bias"), False)
    return bool(uses.get(name, True))


def _source(checkpoint: Checkpoint, name: str) -> str:
    setting = SETTINGS.get(name, name)
    if setting in checkpoint.facts.stored_arguments:
        return "stored arguments"
    origins = checkpoint.config.origins if checkpoint.config else {}
    if origin := origins.get(f"model.{setting}"):
        return origin.removeprefix(f"{checkpoint.path}/")
    return "guess" if setting in checkpoint.facts.guesses else FORMATS[checkpoint.format].settings_file
