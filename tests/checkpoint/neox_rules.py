"""What GPT-NeoX asks of a config before it trains, and of a checkpoint before it loads it: its own checks, in short.

Source: `NeoXArgs.validate_types`, `validate_values` and `calculate_derived`, `check_checkpoint_args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castalia.config.neox.keys import KEYS

INTEGERS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "num_layers", "hidden_size", "num_attention_heads",
    "num_kv_heads", "seq_length", "sliding_window_width", "max_position_embeddings", "lr_decay_iters", "iteration",
    "global_num_gpus", "train_iters", "train_epochs", "keep_last_n_checkpoints", "exit_interval", "rotary_emb_base",
    "make_vocab_size_divisible_by", "intermediate_size", "gradient_accumulation_steps", "pipe_parallel_size",
    "model_parallel_size", "log_interval", "eval_interval", "eval_iters", "seed", "num_workers", "top_k",
}  # fmt: skip
CHOICES = {
    "precision": {"fp16", "fp32", "bfloat16"},
    "norm": {"layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm", "te_rmsnorm", "te_layernorm"},
    "pos_emb": {"learned", "rotary", "sinusoidal", "rpe", "alibi", "none"},
    "activation": {
        "gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu",
    },
    "lr_decay_style": {"constant", "linear", "cosine", "exponential"},
    "tokenizer_type": {
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer",
    },
    "data_impl": {"mmap", "cached"},  # "infer", its default, fails there
    "checkpoint_scale": {"linear", "log"},
}  # fmt: skip
LISTS = {f"{split}_data_{what}" for split in ("train", "valid", "test") for what in ("paths", "weights")}
LISTS |= {"extra_save_iters", "attention_config"}
TEXTS = {"data_path", "save", "load", "vocab_file", "merge_file", "split", "tensorboard_dir"}
BLOCKS = {"optimizer", "fp16", "bf16", "zero_optimization", "data_types", "curriculum_learning"}
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "optimizer", "train_iters", "save", "load", "data_impl")
COMPARED = (
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "make_vocab_size_divisible_by",
    "tokenizer_type", "model_parallel_size",
)  # fmt: skip


def mistakes(keys: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Why NeoX would not go on: its types, its required keys, its arithmetic, and the stored arguments."""
    found = [f"{key} is unknown" for key in keys if key not in KEYS]
    found += [f"{key}={value!r}" for key, value in keys.items() if not _has_type(key, value)]
    found += [f"{key} is missing" for key in REQUIRED if keys.get(key) is None]
    found += [f"{key}: {keys.get(key)}, stored {stored[key]}" for key in COMPARED if keys.get(key) != stored[key]]
    ranks = keys["global_num_gpus"] // (max(1, keys["pipe_parallel_size"]) * keys["model_parallel_size"])
    batch = keys["train_micro_batch_size_per_gpu"] * keys.get("gradient_accumulation_steps", 1) * ranks
    found += [] if keys.get("train_batch_size", batch) == batch else [f"{batch} is not the batch"]
    found += [] if keys.get("min_lr", 0.0) <= keys["optimizer"]["params"]["lr"] else ["min_lr is above lr"]
    found += [] if keys.get("checkpoint_factor") else ["nothing is saved"]
    found += [] if keys["eval_interval"] else ["division by eval_interval"]
    paths = [f"{split}_data_paths" in keys for split in ("train", "valid", "test")]
    return found + ([] if any(paths) == all(paths) else ["some of the three splits are missing"])


def _has_type(key: str, value: Any) -> bool:
    """Exactly: a float is no int and a bool neither, but an int may stand for a float."""
    if value is None:
        return True
    if key in CHOICES:
        return value in CHOICES[key]
    if key in INTEGERS:
        return type(value) is int
    if key in LISTS or key in TEXTS or key in BLOCKS:
        return type(value) is (list if key in LISTS else str if key in TEXTS else dict)
    if key == "checkpoint_factor":
        return type(value) in (int, float)
    expected = KEYS[key].type or type(KEYS[key].default)
    return type(value) is expected or (expected is float and type(value) is int)
