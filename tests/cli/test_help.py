"""Each verb's help begins with examples, and they run."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from castalia.cli import main as cli

WORDS = [
    "in",
    "the",
    "beginning",
    "was",
    "the",
    "light",
    "and",
    "the",
    "evening",
    "and",
    "the",
    "morning",
    "were",
    "the",
    "first",
    "day",
    "of",
    "the",
    "waters",
]
RUN = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, max_positions: 64}
data: {path: corpus_text_document, seq_length: 16, split: "80,20,0"}
tokenizer: {path: tokenizer.json}
optimizer: {lr: 0.01}
precision: {compute: fp32}
train: {steps: 20, batch_size: 8, micro_batch_size: 1}
eval: {every: 10, batches: 1}
checkpoint: {every: 10, dir: runs/first}
"""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NEOX = ['{"num-layers": 2, "hidden-size": 32, "num-attention-heads": 4}', '{"seq-length": 16, "train-iters": 20}']


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every verb that does something, `data prepare` for one."""
    for verb in cli.VERBS:
        command = get_command(cli.build(verb)).commands[verb]  # type: ignore[attr-defined]
        parts = getattr(command, "commands", None)
        if parts is None:
            yield verb, command
        else:
            yield from ((f"{verb} {name}", part) for name, part in parts.items())


def examples(command: click.Command) -> list[str]:
    before, _, after = (command.help or "").partition("Examples:\n")
    assert before.strip().count("\n") <= 3  # one sentence comes first, and nothing else
    return [line.strip() for line in after.partition("\n\n")[0].splitlines()]


def test_every_verb_that_reports_has_json() -> None:
    """Those without write what they are asked for (text, records, a config), or are another program's."""
    without = {name for name, command in commands() if not any("--json" in each.opts for each in command.params)}
    assert without == {"lm-eval", "score", "chat", "serve", "config convert"}


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", shlex.split(line))
    monkeypatch.setattr("sys.stdin", io.StringIO("which day?\n"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, line


@pytest.mark.parametrize(("verb", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands()])
def test_help_begins_with_two_examples_of_the_verb(verb: str, command: click.Command) -> None:
    lines = examples(command)
    assert len(lines) >= 2
    assert all(line.startswith(f"castalia {verb}") for line in lines)


def test_lines_of_help_are_not_too_long() -> None:
    for verb, command in commands():
        for line in (command.help or "").splitlines():
            assert len(line) <= 116, f"{verb}: {line}"


@pytest.mark.slow
def test_all_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)  # which serves until a signal comes
    texts = [" ".join(WORDS[n % 7 :] + WORDS[: n % 5]) for n in range(500)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("texts.txt").write_text("\n".join(texts[:5]))
    turns = [{"role": "user", "content": "which day?"}, {"role": "assistant", "content": "the first day"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    Path("prompts.txt").write_text("in the\nand the\n")
    Path("panel.jsonl").write_text("".join(json.dumps({"text": text, "step": 1}) + "\n" for text in texts[:5]))
    Path("notes").mkdir()
    Path("notes", "one.txt").write_text("\n".join(texts))
    Path("run.yml").write_text(RUN)
    for name, text in zip(("125M.yml", "local_setup.yml"), NEOX, strict=True):
        Path(name).write_text(text)
    run("castalia tokenizer train texts.jsonl --output tokenizer.json --vocab-size 300", monkeypatch)
    for name in ("corpus", "a", "b"):
        run(f"castalia data prepare texts.jsonl --tokenizer tokenizer.json --output {name} --append-eod", monkeypatch)
        if name == "corpus":  # so that the example writes it anew
            for seed, folder in enumerate(("first", "second")):
                run(f"castalia train run.yml seed={seed + 1} checkpoint.dir=runs/{folder}", monkeypatch)
    shutil.copyfile("corpus_text_document.bin", "part-0-00000.npy")
    shutil.copytree("runs/first", "model")
    shutil.copytree("runs/first", "runs/chat")
    Path("runs/chat/tokenizer/chat_template.jinja").write_text(TEMPLATE)
    for _, command in commands():
        for line in examples(command):
            capsys.readouterr()
            run(line, monkeypatch)
            assert capsys.readouterr().out.strip(), line
