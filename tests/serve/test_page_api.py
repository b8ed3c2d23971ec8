"""What the page asks for, beside the functions that the verbs use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.load import load_config
from castalia.data.pairs import open_samples
from castalia.data.tokenizer import load_tokenizer
from castalia.examine.inspect import report
from castalia.examine.residuals import logit_lens
from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.observe.metrics import read_metrics
from castalia.serve.app import build_app
from castalia.serve.catalogue import Catalogue
from castalia.serve.loaded_models import Library
from castalia.strict_json import to_json
from tests.serve.page_runs import make_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[TestClient]:
    app = build_app(Catalogue([str(folder)]), Library(2_000_000_000, "cpu"))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def told(page: TestClient, path: str, **params) -> dict:
    answer = page.get(f"/api/{path}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_runs_are_found_with_their_state_and_what_tells_them_apart(page):
    one, two = told(page, "runs")
    assert (one["name"], two["name"]) == ("one", "two") and one["steps"] == 12 and one["events"] == {"spike": 1}
    assert "optimizer.lr 0.01" in one["label"] and "optimizer.lr 0.003" in two["label"]


def test_metrics_are_those_of_the_record_from_any_step_on(page, folder):
    records = list(read_metrics(folder / "one"))
    whole = told(page, "metrics", name="one")
    assert whole["last"] == 12 and whole["columns"]["loss"] == [record["loss"] for record in records]
    assert whole["columns"]["valid_loss"] == [record.get("valid_loss") for record in records]
    assert told(page, "metrics", name="one", after=10)["columns"]["step"] == [11, 12]


def test_a_run_tells_its_events_its_checkpoints_and_where_its_settings_come_from(page):
    run = told(page, "run", name="one")
    assert run["steps"] == [4, 8, 12]
    assert {"start", "save", "evaluation", "spike"} <= {event["event"] for event in run["events"]}
    settings = {each["path"]: each for each in run["settings"]}
    assert settings["optimizer.lr"]["value"] == 0.01 and settings["optimizer.lr"]["changed"]
    assert "config.yml" in settings["optimizer.lr"]["origin"]
    assert not settings["optimizer.eps"]["changed"]


def test_the_documents_of_a_step_are_those_it_trains_on(page, folder):
    rows = told(page, "batch", name="one", step=7)
    config = load_config(folder / "one")
    tokens = open_samples(config).batch(6).tokens
    assert [row["text"] for row in rows] == [load_tokenizer(config.tokenizer).decode(row) for row in tokens]
    assert {piece["corpus"] for row in rows for piece in row["documents"]} == {"texts"}
    answer = page.get("/api/batch", params={"name": "one", "step": 13})
    assert answer.status_code == 400 and "steps are 1 to 12" in answer.json()["error"]["message"]


def test_checkpoints_are_inspected_compared_and_planned_as_the_verbs_do(page, folder):
    path = folder / "one" / "checkpoints" / "step_000012"
    assert told(page, "inspect", model="one@12") == json.loads(to_json(report(open_checkpoint(path, adapters=True))))
    found = told(page, "diff", a="one@4", b="one@latest")
    assert found["verdict"] == "fine_tune" and found["structure"] == ["step: 4 | 12"]
    assert told(page, "plan", model="one@12")["training"]["steps"] == 12


def test_the_lens_is_that_of_the_verb(page, folder):
    path, text = folder / "one" / "checkpoints" / "step_000012", "naïve text"
    answer = page.post("/api/lens", json={"model": "one@12", "text": text})
    found, wanted = answer.json(), logit_lens(load_model(path), tokenizer_at(path), text)
    assert tuple(found["ids"]) == wanted.ids and "".join(found["texts"]) == text
    for row, other in zip(found["rows"], wanted.rows, strict=True):
        assert row["next_prob"] == pytest.approx(other.next_prob, abs=1e-5)
        assert row["entropy"] == pytest.approx(other.entropy, abs=1e-4)
    assert page.post("/api/pieces", json={"model": "one@12", "text": text}).json()["ids"] == found["ids"]


@pytest.mark.parametrize(
    ("path", "params", "status"),
    [
        ("run", {}, 400),
        ("run", {"name": "../one"}, 404),
        ("metrics", {"name": "one", "after": "-1"}, 400),
        ("batch", {"name": "one", "step": "x"}, 400),
        ("batch", {"name": "one"}, 400),
        ("inspect", {"model": "/etc"}, 404),
        ("diff", {"a": "one@4"}, 400),
        ("plan", {"model": "three"}, 404),
    ],
)
def test_bad_requests_are_refused_in_words(page, path, params, status):
    answer = page.get(f"/api/{path}", params=params)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_bad_texts_are_refused(page):
    for body in ({"model": "one@4"}, {"model": "one@4", "text": ""}, {"model": "one@4", "text": "x", "top": 3}):
        assert page.post("/api/lens", json=body).status_code == 400
    assert page.post("/api/lens", json={"model": "none", "text": "x"}).status_code == 404
    long = page.post("/api/lens", json={"model": "one@4", "text": "x" * 300})
    assert long.status_code == 400 and "at most" in long.json()["error"]["message"]


def test_the_page_and_its_files_are_served_and_small(page):
    sizes = 0
    for name in ("", "page.css", "page.js", "plot.js", "runs.js", "try.js", "compare.js", "inside.js"):
        answer = page.get(f"/{name}")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org", "") and "https://" not in answer.text
        sizes += len(answer.content)
    assert sizes < 60_000
