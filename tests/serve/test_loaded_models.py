"""Names of checkpoints, and which of them are in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from castalia.errors import CheckpointError, ConfigError
from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.plan.stream_plan import PROGRAM_BYTES
from castalia.serve import catalogue
from castalia.serve import loaded_models as shelves
from castalia.serve.app import build_app
from castalia.serve.catalogue import Catalogue
from castalia.serve.loaded_models import Busy, Library


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A run of two steps, and a folder of its own beside it."""
    place = tmp_path / "all"
    for step in (10, 20):
        shutil.copytree(models / "neox", place / "run" / f"step{step}")
    shutil.copytree(models / "llama", place / "sub" / "other")
    return place


def test_names(folder: Path, models: Path, tmp_path: Path) -> None:
    names = Catalogue([str(folder)])
    assert [entry.name for entry in names.models()] == ["run@10", "run@20", "sub/other"]
    for name, found in {"run": "run@20", "run@latest": "run@20", "run@10": "run@10", "sub/other": "sub/other"}.items():
        entry = names.find(name)
        assert entry is not None and entry.name == found
    for name in ("run@30", "runs", "", "@latest", "../all/run", str(folder / "run"), "sub", "run/step10"):
        assert names.find(name) is None
    one = Catalogue([str(folder / "run")]).models()
    assert [entry.name for entry in one] == ["run@10", "run@20"]
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        Catalogue([str(_empty(tmp_path))])
    with pytest.raises(ConfigError, match="run: several"):
        shutil.copytree(folder / "run", tmp_path / "other" / "run")
        Catalogue([str(folder), str(tmp_path / "other" / "run")])
    with pytest.raises(ConfigError, match="run: several"):
        Catalogue([str(folder / "run")], {"run": str(models / "llama")})


def _empty(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


def test_a_folder_that_cannot_be_read_hides_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_folder = Path.iterdir

    def locked(place: Path) -> Iterator[Path]:
        if place.name == "sub":
            raise PermissionError(13, "Permission denied", str(place))
        return list_folder(place)

    monkeypatch.setattr(Path, "iterdir", locked)
    assert [entry.name for entry in Catalogue([str(folder)]).models()] == ["run@10", "run@20"]
    with pytest.raises(PermissionError):
        Catalogue([str(folder / "sub")])


def test_a_new_checkpoint_appears_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FRESH_SECONDS", 0.0)
    library = Library(2_000_000_000, "cpu")
    with TestClient(build_app(Catalogue([str(folder / "run")]), library), base_url="http://localhost") as client:
        asked = {"model": "run@latest", "prompt": "In", "max_tokens": 1}
        assert client.post("/v1/completions", json=asked).json()["model"] == "run@20"
        shutil.copytree(folder / "run" / "step20", folder / "run" / "step30")
        assert client.post("/v1/completions", json=asked).json()["model"] == "run@30"
        assert {entry["id"] for entry in client.get("/v1/models").json()["data"]} == {"run@10", "run@20", "run@30"}


def test_checkpoints_make_room_by_least_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "ROOM_SECONDS", 0.1)
    entries = Catalogue([str(folder)]).models()
    roomy = Library(2_000_000_000, "cpu")

    async def use(library: Library, *numbers: int) -> list[str]:
        for number in numbers:
            async with library.lease(entries[number]):
                pass
        return [loaded.entry.name for loaded in library.loaded.values()]

    assert anyio.run(use, roomy, 0, 1, 2, 0) == ["run@20", "sub/other", "run@10"]
    roomy.close()
    # What is left beside weights and work is shared out, a quarter to each: two have room, three have not.
    each = max(loaded.plan.weights + loaded.plan.working for loaded in roomy.loaded.values())
    tight = Library(PROGRAM_BYTES + int(3.3 * each), "cpu")
    assert anyio.run(use, tight, 0, 1) == ["run@10", "run@20"]
    assert anyio.run(use, tight, 0, 2) == ["run@10", "sub/other"]
    assert len(tight.worker.engines) == 2

    async def hold() -> None:
        async with tight.lease(entries[0]), tight.lease(entries[2]):
            with pytest.raises(Busy, match="run@10, sub/other"):
                async with tight.lease(entries[1]):
                    pass
        async with tight.lease(entries[1]):
            assert tight.used <= tight.memory

    anyio.run(hold)
    tight.close()


def test_a_model_that_is_larger_than_the_memory_is_streamed_and_says_so(models: Path) -> None:
    names, text = Catalogue([str(models)]), "In the beginning"
    streamed = False
    for memory in range(300_500_000, 500_000_000, 3_000_000):
        library = Library(memory, "cpu")
        with TestClient(build_app(names, library), base_url="http://localhost") as client:
            asked = {"model": "neox", "prompt": text, "max_tokens": 9, "temperature": 0}
            answer = client.post("/v1/completions", json=asked)
        if answer.status_code == 200:
            reply = answer.json()
            streamed |= "read from disk" in reply["usage"].get("warning", "")
            expected = load_model(models / "neox").generate([text], max_tokens=9)[0]
            assert reply["choices"][0]["text"] == expected
            break
        assert answer.status_code == 400 and "neox" in answer.json()["error"]["message"]
    assert answer.status_code == 200


def test_adapters_have_names_of_their_own(models: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(models / "neox")
    tuned = get_peft_model(model, LoraConfig(target_modules=["query_key_value"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "tuned")
    ids = tokenizer_at(models / "neox").encode("In the beginning")
    with torch.inference_mode():
        expected = tuned(torch.tensor([ids])).logits.log_softmax(dim=-1)[0]
    names = Catalogue([str(models / "neox")], {"mine": str(tmp_path / "tuned")})
    with TestClient(build_app(names, Library(2_000_000_000, "cpu")), base_url="http://localhost") as client:
        assert {entry["id"] for entry in client.get("/v1/models").json()["data"]} == {"neox", "mine"}
        plain, mine = (
            client.post("/v1/score", json={"model": name, "input": ids}).json()["data"][0]["nll"][1:]
            for name in ("neox", "mine")
        )
    own = [-float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert mine == pytest.approx(own, abs=1e-4) and plain != pytest.approx(own, abs=1e-2)
