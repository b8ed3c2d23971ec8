"""Real clients: openai, llm, lm-eval, curl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import openai
import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.tasks.harness import TaskModel
from tests.serve.server_process import Served, serving
from tests.tasks.conftest import verses


@pytest.fixture(scope="module")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(log, str(models), "--device", "cpu", "--memory", "2GB") as served:
        yield served
        assert not log.read_text()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openai_completions(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"neox", "llama"}
    asked = {"model": "neox", "prompt": "In the", "temperature": 1.0, "seed": 3, "max_tokens": 20}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.token_logprobs)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].usage == whole.usage


def test_openai_conversations(client: openai.OpenAI) -> None:
    asked = {"model": "llama", "messages": [{"role": "user", "content": "who?"}], "seed": 3, "max_completion_tokens": 9}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)
    parts = [part.choices[0] for part in client.chat.completions.create(**asked, stream=True)]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="neox", prompt="a", extra_body={"min_p": 0.1})
    assert refused.value.param == "min_p" and "min_p" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="a")


@pytest.mark.parametrize("streams", [True, False])
def test_llm_writes_what_openai_gets(served: Served, client: openai.OpenAI, tmp_path: Path, streams: bool) -> None:
    entries = [
        {"model_id": "words", "model_name": "neox", "api_base": f"{served.url}/v1", "completion": True},
        {"model_id": "talk", "model_name": "llama", "api_base": f"{served.url}/v1"},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML
    options = ["-o", "max_tokens", "9", "-o", "seed", "3", "-o", "temperature", "1"]
    settings = {"max_tokens": 9, "seed": 3, "temperature": 1}
    written = client.completions.create(model="neox", prompt="In the", **settings).choices[0].text
    asked = [{"role": "user", "content": "who?"}]
    said = client.chat.completions.create(model="llama", messages=asked, **settings).choices[0].message.content
    for model, prompt, expected in (("words", "In the", written), ("talk", "who?", said)):
        command = ["-m", "llm", "-m", model, prompt, *options, "--no-log", *([] if streams else ["--no-stream"])]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)
        assert (found.returncode, found.stdout.rstrip("\n")) == (0, expected.rstrip("\n")), found.stderr


def test_curl(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    body = {"model": "neox", "prompt": "In the", "max_tokens": 3, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{served.url}/v1/completions", "--json", json.dumps(body)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("data: {") and said.endswith("data: [DONE]\n\n")
    command = ["curl", "-s", f"{served.url}/v1/completions", "-d", json.dumps(body)]  # declared as a form
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "Content-Type: application/json" in json.loads(said)["error"]["message"]


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_lm_eval_has_the_scores_of_the_native_adapter(models: Path, tmp_path: Path, name: str) -> None:
    """The tokenizer is found on the server, which has one; scores and choices are those of the model itself."""
    with serving(tmp_path / "log", str(models / name), "--device", "cpu", "--memory", "2GB") as served:
        compare_scores(served, models, name)


def compare_scores(served: Served, models: Path, name: str) -> None:
    theirs = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model=name, max_length=97, batch_size=3, num_concurrent=1
    )
    assert theirs.tokenizer_backend == "remote"
    ours = TaskModel(load_model(models / name), tokenizer_at(models / name), length=96)
    texts = verses()
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts[:12]]
    # Texts become ids by different rules, for a model that puts a token at the beginning: so give the same ids.
    requests = [(pair, ours.tok_encode(pair[0]), ours.words.encode_batch([pair[1]], bare=True)[0]) for pair in pairs]
    requests = [(pair, context[-40:], rest[:40]) for pair, context, rest in requests]
    expected = ours._loglikelihood_tokens(requests)
    found = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    for (log_prob, greedy), (other, likeliest) in zip(expected, found, strict=True):
        assert other == pytest.approx(log_prob, abs=1e-4)
        assert likeliest == greedy


@pytest.mark.slow
def test_lm_eval_runs_tasks(models: Path, tmp_path: Path) -> None:
    """A whole task, with the tokenizer that lm-eval finds on the server."""
    with serving(tmp_path / "log", str(models / "neox"), "--device", "cpu", "--memory", "2GB") as served:
        compare_tasks(served, models)


def compare_tasks(served: Served, models: Path) -> None:
    folder = Path(__file__).parents[2] / "castalia/tasks/demo"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="neox", max_length=97, batch_size=4, num_concurrent=1
    )
    ours = TaskModel(load_model(models / "neox"), tokenizer_at(models / "neox"), length=96)
    options = {"tasks": ["castalia_demo"], "limit": 8, "task_manager": manager, "bootstrap_iters": 0}
    expected = lm_eval.simple_evaluate(ours, **options)["results"]
    found = lm_eval.simple_evaluate(theirs, **options)["results"]
    assert expected.keys() == found.keys()
    for task, values in expected.items():
        for metric, value in values.items():
            if isinstance(value, float):
                assert found[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
