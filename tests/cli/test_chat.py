"""`castalia chat` and `generate --chat` beside transformers, on a model that has learned to answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli import main as cli
from castalia.cli.convert import command as convert
from tests.cli.chat_model import LESSONS, SYSTEM, answers_of_transformers, conversation, make_chat_model

QUESTIONS = list(LESSONS)


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request, tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture
def castalia(monkeypatch, capsys):
    """A call of the program: its standard output and its messages, given standard input."""

    def call(*words: str, typed: str = "", code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["castalia", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == code, err
        return out, err

    return call


def test_turns_are_answered_as_transformers_does(model, castalia):
    out, _ = castalia("chat", str(model), "--system", SYSTEM, typed="\n".join(QUESTIONS) + "\n")
    assert out.splitlines() == list(LESSONS.values()) == answers_of_transformers(model, QUESTIONS, SYSTEM)
    words = ("--system", SYSTEM, "--memory", "1GB")
    streamed, told = castalia("chat", str(model), *words, typed="\n".join(QUESTIONS) + "\n")
    assert streamed == out and "each pass reads" in " ".join(told.split())


def test_a_question_from_the_command_line(model, castalia):
    options = ("--chat", "--system", SYSTEM, "--prompt", QUESTIONS[0])
    assert castalia("generate", str(model), *options)[0] == "Adam was.\n"
    record = json.loads(castalia("generate", str(model), *options, "--json")[0])
    assert record == {"prompt": QUESTIONS[0], "text": "Adam was.", "finish_reason": "stop"}
    record = json.loads(castalia("generate", str(model), *options, "--json", "--max-tokens", "2")[0])
    assert record["finish_reason"] == "length" and "Adam was.".startswith(record["text"])
    assert castalia("generate", str(model), *options, "--stop", "was")[0] == "Adam \n"
    asked = castalia("generate", str(model), "--chat", "--prompt", QUESTIONS[0], "--max-tokens", "24")[0]
    assert asked.rstrip("\n") == answers_of_transformers(model, QUESTIONS[:1], None)[0].rstrip("\n")


def test_the_conversation_is_saved_forgotten_and_written_again(model, castalia, tmp_path):
    file = tmp_path / "talk.jsonl"
    said = [*QUESTIONS, "/regenerate", f"/save {file}", "/reset", QUESTIONS[0], "/system", "/regenerate"]
    out, err = castalia("chat", str(model), "--system", SYSTEM, typed="\n".join(said), code=2)
    first, second = LESSONS.values()
    assert out.splitlines() == [first, second, second, first]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"messages": conversation(2)}]
    assert "no answer yet" in err


@pytest.mark.parametrize(
    ("typed", "words", "message"),
    [
        ("/sing", [], "there is no command /sing"),
        ("/save", [], "needs the name of a FILE"),
        ("/save README", [], "README exists already"),
        ("x " * 200, [], "tokens, with what the template puts around it; the model takes 160"),
        ("", ["--stop", ""], "--stop is empty"),
        ("", ["--adapter", "."], "is not a PEFT folder"),
    ],
)
def test_mistakes_are_one_message(model, castalia, typed, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README").write_text("")
    _, err = castalia("chat", str(model), *words, typed=typed, code=2)
    assert err.splitlines()[-1].startswith("error: ")
    assert any(part in err for part in message.split("|")), err


def test_without_a_template_it_is_asked_for(model, castalia, tmp_path):
    bare = tmp_path / "bare"
    convert(str(model), bare, to="hf")
    (bare / "chat_template.jinja").unlink()
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    _, err = castalia("chat", str(bare), code=2)
    assert "has no chat template" in err and "--chat-template" in err
    out, _ = castalia("chat", str(bare), "--chat-template", str(model), "--system", SYSTEM, typed=QUESTIONS[0])
    assert out == "Adam was.\n"


def test_the_oldest_turns_leave_the_view_first(model, castalia):
    out, err = castalia("chat", str(model), "--max-tokens", "20", typed=f"{'a b c ' * 12}\n" * 4)
    assert len(out.splitlines()) >= 4 and "no longer in the model's view of 160 tokens" in err


@pytest.mark.parametrize("way", [["native", "hf"], ["neox", "hf"]], ids="-".join)
def test_all_of_the_tokenizer_travels(model, castalia, tmp_path, way):
    place = model
    for form in way:
        target = tmp_path / form
        convert(str(place), target, to=form)
        place = target
        out, _ = castalia("chat", str(place), "--system", SYSTEM, typed="\n".join(QUESTIONS))
        assert out.splitlines() == list(LESSONS.values())
    assert answers_of_transformers(place, QUESTIONS, SYSTEM) == list(LESSONS.values())
    assert open_checkpoint(place).config.model is not None
