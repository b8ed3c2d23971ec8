"""GPT-NeoX's keys that describe an architecture and depend on each other."""

from __future__ import annotations

from typing import Any

from castalia.config.neox.keys import KEYS, lower
from castalia.config.neox.translation import Translation, is_a
from castalia.config.schema import shortest

# GPT-NeoX's name of a gated activation -> ours of the function in it.
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "bilinear": "identity", "glu": "sigmoid"}
# GPT-NeoX's name of a norm -> ours, and the key of its epsilon.
NORMS = {
    "layernorm": ("layernorm", "layernorm_epsilon"),
    "te_layernorm": ("layernorm", "layernorm_epsilon"),
    "rmsnorm": ("rmsnorm", "rms_norm_epsilon"),
    "te_rmsnorm": ("rmsnorm", "rms_norm_epsilon"),
    "scalenorm": ("scalenorm", "scalenorm_epsilon"),
    "non_parametric_layernorm": ("layernorm_no_params", "layernorm_epsilon"),
}


MIXERS = {
    "global": "attention",
    "flash": "attention",
    "gmlp": "gmlp",
    "amlp": "amlp",
    "mamba": "mamba",
    "rwkv": "rwkv",
}  # of layers -> ours


def attention(work: Translation) -> None:
    """What mixes the tokens of each layer. Layers of kind `global` or `flash` are the same here."""
    layers, unique = work["num_layers"], work["num_unique_layers"]
    if work.has("num_unique_layers") and unique != layers:
        work.error("num_unique_layers", "is refused: layers that share their weights are not built in; remove the key")
    if not work.has("attention_config"):
        return
    try:
        kinds = _expand(work["attention_config"], layers if is_a(layers, int) else None)
    except (TypeError, ValueError, ZeroDivisionError):
        work.error("attention_config", 'is not a list of [[kinds], repeat] pairs such as [[["flash"], 12]]')
        return
    strange = sorted({str(kind) for kind in kinds} - MIXERS.keys())
    if strange:
        known = f"use {', '.join(MIXERS)}"
        work.error("attention_config", f"is refused: {', '.join(strange)} layers are not built in; {known}")
        return
    mixers = [MIXERS[kind] for kind in kinds]
    if is_a(layers, int) and len(kinds) != layers:
        text = f"names {len(kinds)} layers, num_layers ({work.given['num_layers'].origin}) is {layers}"
        later = work.given["num_layers"].precedence > work.given["attention_config"].precedence
        if later and len(set(mixers)) == 1:
            work.note("attention_config", f"{text}: as all are alike, it is taken for {layers}")
        else:
            work.error("attention_config", f"{text}; make them agree or remove attention_config")
    if set(mixers) - {"attention"}:
        work.set("model.pattern", shortest(mixers), "attention_config")


def _pattern(work: Translation) -> tuple[str, ...]:
    """What `attention` has found, or attention in all layers."""
    return work.settings["model.pattern"].value if "model.pattern" in work.settings else ("attention",)


def gated_layers(work: Translation) -> None:
    """gMLP and aMLP: their spatial matrix has the size of `seq_length`, which our longest sequence gives it."""
    pattern = _pattern(work)
    if "amlp" in pattern:
        work.set("model.amlp_size", work["gmlp_attn_dim"], "gmlp_attn_dim")
    elif work.has("gmlp_attn_dim") and work["gmlp_attn_dim"] != KEYS["gmlp_attn_dim"].default:
        work.idle("gmlp_attn_dim", "only amlp layers have a small attention, and there is none")
    length, longest = work["seq_length"], work["max_position_embeddings"]
    if not {"gmlp", "amlp"} & set(pattern) or not work.has("seq_length"):
        return
    if work.has("max_position_embeddings") and longest != length:
        if lower(work["pos_emb"]) == "learned":
            text = f"is refused beside gmlp layers and seq_length: {length}, the size of their spatial matrix"
            work.error("max_position_embeddings", f"{text}; make them equal")
            return
        work.note("max_position_embeddings", f"is taken for {length}: the spatial matrix of gmlp layers is no larger")
    work.set("model.max_positions", length, "seq_length")


def _expand(config: Any, layers: int | None) -> list[Any]:
    """The kind of each layer in `[[["flash"], 2], [["local", "global"], "all"]]`. Raises TypeError or ValueError."""
    if not isinstance(config, list):
        raise TypeError
    if all(isinstance(kind, str) for kind in config):
        return config
    kinds: list[Any] = []
    for pattern, repeat in config:
        if not isinstance(pattern, list):
            raise TypeError
        if lower(repeat) == "all":
            # "all" repeats the pattern over the remaining layers.
            left = layers - len(kinds) if layers else len(pattern)
            return kinds + pattern * (left // len(pattern))
        kinds += pattern * repeat
    return kinds


def mamba(work: Translation) -> None:
    """Sizes of Mamba layers. Their width takes the keys of the MLP's, with another default."""
    flags = {"mamba_use_bias_in_conv": "conv_bias", "mamba_use_bias_in_linears": "linear_bias"}
    if "mamba" not in _pattern(work):
        for key in flags:
            if work.has(key) and work[key] != KEYS[key].default:
                work.idle(key, "no layer is mamba")
        return
    for key, name in flags.items():
        if work.has(key):
            work.set(f"model.mamba.{name}", work[key], key)
    hidden, keys = work["hidden_size"], ("intermediate_size", "expansion_factor", "hidden_size")
    if is_a(hidden, int) and work.has("intermediate_size", "expansion_factor"):
        width = work["intermediate_size"] or int((work["expansion_factor"] or 2) * hidden)
        work.set("model.mamba.width", None if width == 2 * hidden else width, *keys)


def rwkv(work: Translation) -> None:
    """The width of RWKV layers takes the keys of the MLP's, with another default, and is rounded down."""
    hidden, keys = work["hidden_size"], ("intermediate_size", "expansion_factor", "hidden_size")
    if "rwkv" not in _pattern(work):
        if work.has("dim_att"):
            work.idle("dim_att", "no layer is rwkv")
        return
    if work.has("dim_att") and work["dim_att"] != hidden:
        work.error("dim_att", f"is refused unless it is hidden_size ({hidden}): GPT-NeoX fails with any other")
    if is_a(hidden, int) and work.has("intermediate_size", "expansion_factor"):
        width = (work["intermediate_size"] or int((work["expansion_factor"] or 3.5) * hidden)) // 32 * 32
        if width <= 0:
            named = "intermediate_size" if work.has("intermediate_size") else "expansion_factor"
            work.error(named, "gives rwkv layers no width: it is rounded down to a multiple of 32")
            return
        work.set("model.rwkv.width", None if width == int(3.5 * hidden) // 32 * 32 else width, *keys)


def activation(work: Translation) -> None:
    """The activation function, gated or not; GELU is the tanh approximation if its kernel is fused."""
    if not (work.architecture or work.has("activation")):
        return
    name = lower(work["activation"])
    if work.has("activation") and set(_pattern(work)) <= {"mamba", "rwkv"}:
        work.idle("activation", "mamba and rwkv layers have their own")
    keys = ("activation", "bias_gelu_fusion", "onnx_safe")
    # GPT-NeoX's fused GELU kernel is the tanh approximation, the unfused one is exact.
    tanh = work["bias_gelu_fusion"] and not work["onnx_safe"]
    plain = {"gelu": "gelu_tanh" if tanh else "gelu", "swish": "silu"}.get(name, name)
    work.set("model.activation", GATED.get(name, plain), *keys)
    work.set("model.gated_mlp", name in GATED, "activation")


def mlp_width(work: Translation) -> None:
    """The inner width by GPT-NeoX's rules: for gated activations 2/3 of the size, then rounded up to a multiple.

    The two matrices are sized separately there (`ParallelMLP`), so that some sizes give matrices that do not fit.
    """
    keys = ("intermediate_size", "expansion_factor", "mlp_multiple_of", "hidden_size", "activation")
    hidden, multiple = work["hidden_size"], work["mlp_multiple_of"]
    gated = lower(work["activation"]) in GATED
    if "attention" not in _pattern(work):
        sized = {"mamba", "rwkv"} & set(_pattern(work))
        used = ("intermediate_size", "expansion_factor") if sized else ()
        for key in ("intermediate_size", "expansion_factor", "mlp_multiple_of"):
            if work.has(key) and key not in used:
                work.idle(key, "no layer has an MLP")
        return
    if not (gated or work.has("intermediate_size", "expansion_factor", "mlp_multiple_of")):
        return
    key = "intermediate_size" if work.has("intermediate_size") else "expansion_factor"
    if work.has("intermediate_size"):
        size = work["intermediate_size"]
    elif is_a(hidden, int):
        size = int((work["expansion_factor"] or 4) * hidden)
    else:
        return
    if size <= 0 or multiple <= 0:
        named = next(k for k in (key, "mlp_multiple_of", "hidden_size") if work.has(k))
        work.error(named, "gives no MLP width: hidden_size, expansion_factor and mlp_multiple_of must be positive")
        return
    # As GPT-NeoX rounds them: the first matrix, which holds gate and up together, to twice the multiple.
    base = size * 2 // 3 if gated else size
    first = _round_up(base, 2 * multiple)
    second = _round_up(base // 2 if gated else base, multiple)
    if first != second * (2 if gated else 1):
        named = next(k for k in (key, "mlp_multiple_of", "activation") if work.has(k))
        wish = f"intermediate_size: {3 * size} for an inner width of {size}" if gated else "an even width"
        work.error(named, f"gives MLP matrices of {first} and {second} columns that do not fit together; use {wish}")
        return
    if gated and work.has("intermediate_size"):
        work.note("intermediate_size", f"gives an inner width of {second} (a third, as gated MLPs are counted there)")
    if work.architecture or work.has("intermediate_size", "expansion_factor"):
        work.set("model.mlp_size", second if second != 4 * (hidden or 0) else None, *keys)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def experts(work: Translation) -> None:
    """A mixture of experts in every `moe_expert_interval`th layer.

    Their width follows rules of its own (`megatron/model/moe_mlp.py`): no gate, four times the hidden size rounded up
    to a multiple of 256, or `intermediate_size` as it is.
    """
    others = {
        "moe_expert_interval": "every",
        "moe_top_k": "top_k",
        "moe_router_type": "router",
        "moe_jitter_eps": "jitter",
    }
    count, hidden = work["moe_num_experts"], work["hidden_size"]
    if count <= 1:
        for key in others:
            if work.has(key) and work[key] != KEYS[key].default:
                work.note(key, "has no effect here: moe_num_experts is 1")
        return
    work.set("model.experts.count", count, "moe_num_experts")
    for key, name in others.items():
        if work.has(key) or name == "router":
            work.set(f"model.experts.{name}", lower(work[key]), key)
    if work.has("intermediate_size") or is_a(hidden, int):
        width = work["intermediate_size"] or _round_up(4 * hidden, 256)
        work.set("model.experts.width", width, "moe_num_experts", "intermediate_size", "hidden_size")
    if lower(work["activation"]) in GATED:
        work.note("activation", "is applied without a gate in experts, as GPT-NeoX does; the other MLPs have one")


def norm(work: Translation) -> None:
    """The norm and its epsilon, which has a key for each norm."""
    if not (work.architecture or work.has("norm")):
        return
    if lower(work["norm"]) not in NORMS:
        work.error("norm", f"is none of {', '.join(NORMS)}")
        return
    name, epsilon = NORMS[lower(work["norm"])]
    work.set("model.norm", name, "norm")
    work.set("model.norm_eps", work[epsilon], epsilon)


def residual(work: Translation) -> None:
    """`gpt_j_tied`: attention and MLP of a parallel residual share one norm."""
    if work["gpt_j_tied"] and not work["gpt_j_residual"]:
        work.idle("gpt_j_tied", "it needs gpt_j_residual: true")
    elif work.has("gpt_j_tied"):
        work.set("model.shared_norm", work["gpt_j_tied"], "gpt_j_tied")


def vocabulary(work: Translation) -> None:
    """GPT-NeoX pads the vocabulary to a multiple on each tensor rank, so ours is the product."""
    if work.has("model_parallel_size"):
        work.set("parallel.tp", work["model_parallel_size"], "model_parallel_size")
    if work.architecture or work.has("make_vocab_size_divisible_by"):
        keys = ("make_vocab_size_divisible_by", "model_parallel_size")
        if all(isinstance(work[key], int) for key in keys):
            work.set("model.vocab_multiple", work[keys[0]] * work[keys[1]], *keys)


def mup(work: Translation) -> None:
    """muP's multipliers. GPT-NeoX reads the base model's shapes from a file, which a width replaces here."""
    fields = {
        "mup_init_scale": "init_scale",
        "mup_attn_temp": "attention_temperature",
        "mup_output_temp": "output_temperature",
        "mup_embedding_mult": "embedding_multiplier",
        "mup_rp_embedding_mult": "position_multiplier",
    }
    if not work["use_mup"]:
        for key in (*fields, "base_shapes_file"):
            if work.has(key) and work[key] != KEYS[key].default:
                work.idle(key, "use_mup is off")
        return
    for key, name in fields.items():
        work.set(f"model.mup.{name}", float(work[key]), "use_mup", key)
    if work.has("base_shapes_file") and "model.mup.base_width" not in work.ours:
        work.error("base_shapes_file", "cannot be read: give model.mup.base_width, the base model's hidden_size")


def dropout(work: Translation) -> None:
    """GPT-NeoX's `hidden_dropout` applies to the embeddings as well."""
    if work.has("hidden_dropout"):
        for path in ("model.hidden_dropout", "model.embedding_dropout"):
            work.set(path, work["hidden_dropout"], "hidden_dropout")


MODEL = (
    attention, gated_layers, mamba, rwkv, activation, mlp_width, experts, norm, residual, vocabulary, mup, dropout,
)  # fmt: skip
