"""What the program prints and writes as JSON is JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from castalia.cli import main as cli
from castalia.strict_json import to_json
from tests.checkpoint.made import FAMILIES, changed, made, written


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_json_has_no_word_for_is_null() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": "NaN"}, 3: True}
    assert strict(to_json(value)) == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "NaN"}, "3": True}


@pytest.mark.parametrize("verb", [["inspect", "bad"], ["inspect", "bad", "--tensors"], ["diff", "bad", "good"]])
def test_a_broken_model_is_told_in_json(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    good = made(FAMILIES["gpt_neox"])
    broken = good.model["blocks.0.mlp.up.weight"].read()
    broken[0], broken[1] = math.nan, math.inf
    zero = torch.zeros_like(good.model["embed.weight"].read())
    written(good, tmp_path / "good", "native")
    written(changed(good, blocks__0__mlp__up__weight=broken, embed__weight=zero), tmp_path / "bad", "native")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["castalia", *verb, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and isinstance(strict(capsys.readouterr().out), dict)


def test_no_verb_prints_json_by_another_hand() -> None:
    folder = Path(cli.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "print(json.dumps" in path.read_text()] == []
