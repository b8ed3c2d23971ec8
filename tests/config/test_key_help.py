"""Each key is explained with an example that is accepted, and in both directions between us and GPT-NeoX."""

from __future__ import annotations

import pytest

from castalia.config.fields import FIELDS, SECTIONS
from castalia.config.key_help import WHEN, explanation, neox_names
from castalia.config.load import load_config
from castalia.config.neox.keys import KEYS

MODEL = {"model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2}}
# Their sections need further keys, their values a file, or they go with others alone.
NOT_ALONE = ("data.seq_length_warmup.", "train.batch_size_warmup.", "log.profile.", "finetune.lora.")
NOT_ALONE += ("model.zero_centered_norms",)
NOT_ALONE += ("model.rope_scaling.", "model.experts.", "parallel.cp_kind", "parallel.pipeline", "train.objective")


def example(key: str) -> str | None:
    line = next((line for line in explanation(key) if line.lstrip().startswith("example ")), None)
    return line.split("run.yml ")[1].strip("'") if line else None


def test_advice_is_about_keys_that_exist():
    assert WHEN.keys() <= FIELDS.keys() | SECTIONS.keys()
    assert len(WHEN) > 30


@pytest.mark.parametrize("key", [key for key in (*FIELDS, *SECTIONS) if not key.startswith(NOT_ALONE)])
def test_examples_are_accepted(key):
    words = example(key)
    if words is None or (key not in WHEN and FIELDS.get(key) and FIELDS[key].is_required()):
        return
    load_config([MODEL] if key.startswith("model.") else [], [words], any_batch=True)


def test_lists_and_sections_tell_what_they_hold():
    said = "\n".join(explanation("data.train"))
    for part in ("path: text", "labels: text or null", "weight: a number above 0", "train_data_paths"):
        assert part in said
    assert "base_width: a whole number" in "\n".join(explanation("model.mup"))


def test_each_plain_argument_of_neox_leads_to_its_key_and_back():
    for name, row in KEYS.items():
        for path in row.target.split(", ") if row.kind == "to" else ():
            assert name in neox_names(path), name
            assert any(line.startswith(f"{path}: ") for line in explanation(name)), name
    assert list(explanation("no_such_key")) == []
