"""Keys of config.json that tell for each block whether it has the window, rotates or has experts: read and written.

Ours are the shortest patterns that give the same when they are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from castalia.config.schema import ModelConfig, shortest
from castalia.reading import short

if TYPE_CHECKING:
    from castalia.checkpoint.formats.huggingface.config_json import ConfigJson

WINDOWED, WHOLE = "sliding_attention", "full_attention"  # in `layer_types`


def windowed(config: ConfigJson) -> list[bool]:
    """Which blocks have the window."""
    keys, layers = config.family.keys, config["num_hidden_layers"] or config["num_layers"] or 0
    if "attention_types" in keys:
        return _by_attention_types(config)
    found = _by_layer_types(config, layers) if "layer_types" in keys else [True] * layers
    lacks = "use_sliding_window" in keys and not config["use_sliding_window"]
    return [False] * layers if lacks or config["sliding_window"] is None else found


def _checked(config: ConfigJson, key: str, values: Sequence[Any], words: Mapping[Any, bool]) -> list[bool]:
    """One truth value for each block. Raises CheckpointError for other words, and for another number of them."""
    strange = [value for value in values if value not in words]
    if strange:
        raise config.refuse(f"{key} has {strange[0]!r}, which is not supported; only {' or '.join(map(repr, words))}")
    layers = config["num_hidden_layers"] or config["num_layers"]
    if len(values) != layers:
        raise config.refuse(f"{key} names {len(values)} blocks, of which there are {layers}")
    return [words[value] for value in values]


def _by_layer_types(config: ConfigJson, layers: int) -> list[bool]:
    """By `layer_types`, or as the class has it without that key."""
    if config["layer_types"] is not None:
        return _checked(config, "layer_types", config["layer_types"], {WINDOWED: True, WHOLE: False})
    if "no_rope_layers" in config.family.keys:
        return [not turns for turns in _rotating(config)]
    if "max_window_layers" in config.family.keys:
        return [layer >= config["max_window_layers"] for layer in range(layers)]
    if config["use_sliding_window"]:  # Qwen2-MoE: transformers 5 takes every other block, 4 all or some, by the kernel
        raise config.refuse("use_sliding_window needs layer_types, since versions of transformers differ without it")
    return [layer % 2 == 0 for layer in range(layers)]


def _by_attention_types(config: ConfigJson) -> list[bool]:
    """By GPT-Neo's list of [words, how often]."""
    most = (config["num_layers"] or 0) + 1  # one too many is noticed
    try:
        repeated = (word for part, times in config["attention_types"] for _ in range(min(times, most)) for word in part)
        words = list(islice(repeated, most))
    except (TypeError, ValueError):
        raise config.refuse("attention_types is no list of [words, how often]") from None
    return _checked(config, "attention_types", words, {"global": False, "local": True})


def _rotating(config: ConfigJson) -> list[bool]:
    """Which blocks rotate, by `no_rope_layers`, whose 1 means that they do."""
    if config["no_rope_layers"] is None:
        return [(layer + 1) % config["no_rope_layer_interval"] != 0 for layer in range(config["num_hidden_layers"])]
    return _checked(config, "no_rope_layers", config["no_rope_layers"], {1: True, 0: False})


def _windows(config: ConfigJson, key: str) -> tuple[bool, ...]:
    have = windowed(config)
    return shortest(have) if any(have) else (True,)


def _first_mixed(config: ConfigJson, key: str) -> int:
    """The first block with experts. Raises CheckpointError where there is none."""
    if key != "first_k_dense_replace":
        return _mixed(config).start
    if config[key] >= config["num_hidden_layers"]:
        raise config.refuse(f"{key}={config[key]} leaves no block with experts")
    return config[key]


def _mixed(config: ConfigJson) -> range:
    """The blocks with experts, by Qwen's keys. Raises CheckpointError where they are not at one distance."""
    layers, step, without = config["num_hidden_layers"], config["decoder_sparse_step"], config["mlp_only_layers"] or ()
    if strange := [layer for layer in without if type(layer) is not int]:
        raise config.refuse(f"mlp_only_layers has {strange[0]!r}, which is no number of a block")
    found = sorted(set(range(step - 1, layers, step)) - set(without))
    if not found:
        raise config.refuse(f"decoder_sparse_step={step} and mlp_only_layers leave no block with experts")
    # A single one may be the first of any; see `plain_experts`.
    blocks = range(found[0], layers, found[1] - found[0] if len(found) > 1 else layers - found[0])
    if list(blocks) != found:
        raise config.refuse(
            f"decoder_sparse_step={step} and mlp_only_layers={short(without)} are not supported: the blocks with "
            "experts must be at one distance up to the last block"
        )
    return blocks


READ_PATTERNS: dict[str, Callable[[ConfigJson, str], Any]] = {
    "experts.first": _first_mixed,
    "experts.every": lambda config, key: _mixed(config).step,
    "window_pattern": _windows,
    "rotary_pattern": lambda config, key: shortest(_rotating(config)),
}


def _layers(model: ModelConfig) -> list[bool]:
    """Which blocks have the window."""
    return [model.window_of(layer) is not None for layer in range(model.num_layers)]


def _layer_types(model: ModelConfig) -> list[str]:
    return [WINDOWED if windowed else WHOLE for windowed in _layers(model)]


def _attention_types(model: ModelConfig) -> list[list]:
    """[[words, how often]]; the words of all blocks where their number is no multiple of the pattern's."""
    layers = _layers(model)
    pattern = layers if len(layers) % (size := len(shortest(layers))) else layers[:size]
    return [[["local" if windowed else "global" for windowed in pattern], len(layers) // len(pattern)]]


def _sparse_step(model: ModelConfig) -> int:
    """The distance of blocks with experts where they are the last of each so many, else 1."""
    assert model.experts is not None
    return model.experts.every if (model.experts.first + 1) % model.experts.every == 0 else 1


def _without_experts(model: ModelConfig, key: str) -> list[int] | int:
    """The blocks with an MLP that `decoder_sparse_step` does not show, or the number of those before all others."""
    if key == "first_k_dense_replace":
        return model.layer_kinds.index("moe")
    step = _sparse_step(model)
    return [layer for layer in range(step - 1, model.num_layers, step) if model.layer_kinds[layer] == "dense"]


WRITTEN_PATTERNS: dict[str, Callable[[ModelConfig, str], Any]] = {
    "experts.every": lambda model, key: _sparse_step(model),
    "experts.first": _without_experts,
    "use_window": lambda model, key: model.sliding_window is not None,
    "window_pattern": lambda model, key: (_attention_types if key == "attention_types" else _layer_types)(model),
    # Blocks before the first with a window, by which older versions of transformers go.
    "whole_layers": lambda model, key: [*_layers(model), True].index(True),
    "rotary_pattern": lambda model, key: [int(model.rotates(layer)) for layer in range(model.num_layers)],
}
