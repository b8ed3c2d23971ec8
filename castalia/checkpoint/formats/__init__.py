"""The formats of checkpoints: one row in `FORMATS` and one folder here for each.

A folder has `read.py` with `detect(path) -> bool` and `read(path, **hints) -> Checkpoint`, and `write.py` with
`plan(checkpoint, options) -> Plan`; its tables of names are read by both. `checkpoint/opener.py` and
`checkpoint/convert.py` import these modules when a row is used, so that only this table is loaded before. To add
a format, add a folder and a row. `deepspeed` has no row: it holds the files that NeoX and Megatron-DeepSpeed share.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """What the rest of the program has to know of a format."""

    package: str  # with the modules `read` and `write`
    title: str  # in texts
    target: str  # as `castalia convert --to` calls it
    step_folder: str  # the name of a step's folder
    nested: bool = False  # whether even a single checkpoint is written as a folder with `latest` and a step's folder
    ranks: bool = False  # whether its files are cut over ranks, and differ between eras of the program
    any_optimizer: bool = False  # whether there may be the state of optimizers other than AdamW
    any_dtype: bool = False  # whether fp32 weights of a run in 16 bits are written as they are
    steps: bool = True  # whether the files belong to a step of a run
    weights_optional: bool = False  # whether `detect` may hold without weights; its reader has `has_weights`
    hints: frozenset[str] = frozenset()  # which of `open_checkpoint`'s hints its reader takes
    tolerant: bool = False  # whether its reader can open files whose config describes another model
    file: bool = False  # whether a checkpoint is one file, not a folder, with the model alone
    on_base: bool = False  # whether it holds adapters alone; its reader gets `open_base`, which opens their model
    settings_file: str = "default"  # the source of settings that neither tensors nor a config file show


TRAINER_STATE = "trainer_state.json"  # what the Trainer of transformers writes last into a step's folder
TRAINER_FOLDER = "checkpoint-{step}"  # as it calls this folder
_HERE = "castalia.checkpoint.formats"
FORMATS = {  # name, as in `Checkpoint.format` -> row; the first that detects its files reads them
    "native": Format(
        f"{_HERE}.native", "Castalia", "native", "step_{step:06d}",
        any_optimizer=True, any_dtype=True, settings_file="manifest.json",
    ),
    "peft": Format(  # before Hugging Face, since the model's config.json may lie in the same folder
        f"{_HERE}.peft", "PEFT", "peft", "step{step}", any_dtype=True, hints=frozenset({"base"}), on_base=True,
    ),
    "huggingface": Format(
        f"{_HERE}.huggingface", "Hugging Face", "hf", "step{step}",
        steps=False, weights_optional=True, hints=frozenset({"tokenizer"}), settings_file="config.json",
    ),
    "megatron-deepspeed": Format(
        f"{_HERE}.megatron", "Megatron-DeepSpeed", "megatron-deepspeed", "global_step{step}",
        nested=True, ranks=True, hints=frozenset({"config", "tokenizer"}), tolerant=True,
    ),
    "neox": Format(
        f"{_HERE}.neox", "NeoX", "neox", "global_step{step}",
        nested=True, ranks=True, hints=frozenset({"config", "tokenizer", "gqa_rows", "rms_eps"}), tolerant=True,
    ),
    "gguf": Format(
        f"{_HERE}.gguf", "GGUF", "gguf", "step{step}.gguf",
        file=True, steps=False, any_optimizer=True, hints=frozenset({"tokenizer"}), settings_file="metadata",
    ),
    "rwkv": Format(
        f"{_HERE}.rwkv", "RWKV", "rwkv", "step{step}.pth",
        file=True, steps=False, any_optimizer=True, hints=frozenset({"tokenizer"}), settings_file="tensors",
    ),
}  # fmt: skip
TARGETS = {row.target: row for row in FORMATS.values()}  # by the names of `castalia convert --to`
