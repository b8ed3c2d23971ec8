"""The reference in docs/ is what the schema and the table of NeoX's keys say."""

from __future__ import annotations

from pathlib import Path

from castalia.config.fields import FIELDS
from castalia.config.key_reference import markdown
from castalia.config.neox.keys import KEYS

DOCUMENT = Path(__file__).parents[2] / "docs" / "config-reference.md"


def test_the_reference_is_up_to_date():
    now = "castalia config explain --all > docs/config-reference.md"
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), f"write it anew: {now}"


def test_every_key_of_ours_and_of_neox_has_a_row():
    lines = markdown().splitlines()
    for key in [*FIELDS, *KEYS]:
        assert any(line.startswith(f"| `{key}` |") for line in lines), key
    assert sum(line.startswith("| `optimizer.groups: [{") for line in lines) == 3


def test_rows_say_what_a_key_does():
    text = markdown()
    for row in (
        "| `train_iters` |  | honoured: `train.steps` |",
        "| `soft_prompt_tuning` |  | refused: soft prompts are not built in |",
        "| `deepspeed` | `True` | no effect: DeepSpeed is not used |",
        "| `pipe_partition_method` | `'type:transformer\\|mlp'` | no effect:",
        "| `optimizer.clip_norm` | a number above 0 or null (default 1.0): largest gradient norm; None switches",
    ):
        assert row in text, row
