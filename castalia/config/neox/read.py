"""GPT-NeoX's configs, translated into our settings by one table (`keys.py`).

Keys that depend on each other have functions of their own. Where a GPT-NeoX file describes an architecture or a
training run, GPT-NeoX's defaults apply, so that a key which the file leaves out means the same as in GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

from castalia.config.neox.keys import FORMER, KEYS
from castalia.config.neox.model_keys import MODEL
from castalia.config.neox.training_keys import TRAINING
from castalia.config.neox.translation import Translation, row_of
from castalia.config.schema import RunConfig
from castalia.config.setting import Setting
from castalia.config.yaml_files import Findings

# Keys of DeepSpeed's block `checkpoint`, by which it is told from our section of that name.
DEEPSPEED_CHECKPOINT = {"tag_validation", "load_universal", "use_node_local_storage", "parallel_write"}


def is_neox(key: str, value: Any) -> bool:
    """Whether a top-level key (with underscores) is GPT-NeoX's. A few names are also sections of ours."""
    if key not in RunConfig.model_fields:
        return key in KEYS or key in FORMER
    if not isinstance(value, dict):
        return (key == "precision" and isinstance(value, str)) or (key == "finetune" and isinstance(value, bool))
    if key == "optimizer":
        return bool({"type", "params"} & value.keys())
    return key == "checkpoint" and bool(DEEPSPEED_CHECKPOINT & value.keys())


def translate(
    neox: dict[str, Setting], ours: dict[str, Setting], num_files: int, findings: Findings
) -> dict[str, Setting]:
    """Our settings for GPT-NeoX's merged keys.

    `ours`: the settings given in our own terms. `num_files`: sources of a lower precedence are files, the
    others overrides.
    """
    work = Translation(neox, ours, num_files, findings)
    for key in dict.fromkeys([*work.given, *KEYS]):  # given keys first, so that messages follow the files
        kind = row_of(key).kind
        if kind == "to":
            work.honour(key)
        elif kind == "joint":
            work.require_type(key)
        else:
            work.report(key)
    for function in (*MODEL, *TRAINING):
        function(work)
    return work.settings
