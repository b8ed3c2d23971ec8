"""JSON files with values of any type in place of their own: read, or one error that names the file; no traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import LoraConfig, TokenizerConfig
from castalia.data.journal import Journal
from castalia.data.tokenizer import load_tokenizer, train_bpe
from castalia.errors import CastaliaError
from castalia.observe.metrics import read_events, read_last_metrics, read_metrics, truncate_metrics
from castalia.observe.update_history import history_before
from castalia.storage.checksum import crc32
from tests.checkpoint.made import FAMILIES, made, written
from tests.checkpoint.test_peft import adapted, hugging_face

STRANGE = (None, True, -1, 0, 1.5, 10**30, "", "word", [], [[]], {}, {"a": {"b": []}}, [1, "a", None])
ALL = 10**9
NUMBERS = [40, pytest.param(400, marks=pytest.mark.slow), pytest.param(ALL, marks=pytest.mark.campaign)]
OTHERS = ("", "[", "null", "3", '"text"', "[]", "{}", "[" * 100_000, '{"a":' * 300 + "1" + "}" * 300, "\x00", "NaN")


def variants(value: Any) -> Iterator[Any]:
    """The value with each part, of each of its tables and lists, replaced or left out."""
    yield from STRANGE
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: each for other, each in value.items() if other != key}
            yield from ({**value, key: changed} for changed in variants(inner))
    elif isinstance(value, list) and value:
        yield from ([changed, *value[1:]] for changed in variants(value[0]))


def attack(
    file: Path, read: Callable[[], object], number: int, sealed: Callable[[Any], Any] = lambda value: value
) -> int:
    """Reads the file in so many variants, drawn from all. Returns how many were refused."""
    before = file.read_bytes()
    every = [*OTHERS, *variants(json.loads(before))]
    chosen = random.Random(0).sample(every, min(number, len(every)))
    refused = 0
    for variant in chosen:
        text = variant if isinstance(variant, str) else json.dumps(sealed(variant))
        file.write_text(text)
        try:
            read()
        except CastaliaError as error:
            refused += 1
            assert str(error), text[:300]
        except Exception as error:
            raise AssertionError(f"{file.name}: {type(error).__name__}: {error}\n{text[:1500]}") from error
    file.write_bytes(before)
    return refused


def sealed(manifest: Any) -> Any:
    """With the checksum that belongs to it: what is behind it is to be attacked."""
    if not isinstance(manifest, dict):
        return manifest
    told = {name: value for name, value in manifest.items() if name != "crc32"}
    return told | {"crc32": crc32(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())}


def checkpoint(folder: Path, kind: str) -> Path:
    base = hugging_face(folder / "base", FAMILIES["llama"])
    if kind == "adapter":
        written(adapted(FAMILIES["llama"], LoraConfig(rank=2), base), folder / kind, "peft")
    elif kind == "hf shards":
        written(made(FAMILIES["gpt_neox"]), folder / kind, "hf", shard_bytes=20_000)
    else:
        written(made(FAMILIES["gpt_neox"]), folder / kind, kind)
    return folder / kind


CHECKPOINTS = [
    ("hf", "config.json"), ("hf", "castalia.json"), ("hf shards", "model.safetensors.index.json"),
    ("adapter", "adapter_config.json"), ("native", "manifest.json"),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("kind", "name"), CHECKPOINTS, ids=str)
def test_files_of_checkpoints(kind: str, name: str, number: int, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, kind)
    seal = sealed if kind == "native" else lambda value: value
    assert attack(folder / name, lambda: open_checkpoint(str(folder)), number, seal)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_files_of_tokenizers(name: str, number: int, tmp_path: Path) -> None:
    train_bpe(["a text", "another text"], 270).save(tmp_path)
    token = {"content": "<e>", "lstrip": False, "special": True}
    content = {
        "eos_token": token, "add_bos_token": True, "chat_template": [{"name": "default", "template": "x"}],
        "added_tokens_decoder": {"268": token}, "additional_special_tokens": ["<e>"], "eos_token_id": [1],
    }  # fmt: skip
    (tmp_path / name).write_text(json.dumps(content))
    attack(tmp_path / name, lambda: load_tokenizer(TokenizerConfig(path=str(tmp_path))), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_vocabularies(number: int, tmp_path: Path) -> None:
    train_bpe(["a text", "another text"], 262).save(tmp_path)
    assert attack(tmp_path / "tokenizer.json", lambda: load_tokenizer(TokenizerConfig(path=str(tmp_path))), number)


def test_the_journal_of_a_preparation(tmp_path: Path) -> None:
    """A strange one is as good as none: the work begins anew."""
    journal = Journal(tmp_path / "out", "identity", [])
    journal.path.write_text(json.dumps({"identity": "identity", "chunks": 3, "items": [], "note": {"a": 1}}))
    assert attack(journal.path, journal.restore, ALL) == 0


def test_bad_lines_of_records_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = {"step": 3, "loss": 2.5, "lr": 0.1, "grad_norm": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(good) + "\n")
    bad = [json.dumps({**good, key: value}) for key, value in {"step": "3", "loss": [], "lr": "x"}.items()]
    lines = [json.dumps(good), *bad, *(text for text in OTHERS if text), json.dumps({**good, "step": 4})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 5')
    assert [record["step"] for record in read_metrics(tmp_path)] == [3, 4]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(lines) - 2 and all("metrics.jsonl:" in line for line in told)
    assert [record["step"] for record in read_last_metrics(tmp_path, 2)][-1] == 4
    truncate_metrics(tmp_path, 3, False)
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]


def test_strange_events_end_no_run(tmp_path: Path) -> None:
    event = {"event": "rewind", "step": 7, "back_to": 4, "action": "skip", "time": "now"}
    for changed in variants(event):
        for name in ("start", "save", "spike", "rewind"):
            entry = changed | {"event": name} if isinstance(changed, dict) and "event" in changed else changed
            (tmp_path / "events.jsonl").write_text(json.dumps(entry) + "\n")
            history_before(read_events(tmp_path), 6)
