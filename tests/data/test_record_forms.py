"""Records of many programs are read as what they are, with their prompts; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from castalia.config.schema import TokenizerConfig
from castalia.data.chat import Chat, encode_answer
from castalia.data.indexed import open_dataset
from castalia.data.prepare import Recipe, prepare
from castalia.data.record_forms import Passage, Talk, answer_of, kind_of, pair_of, tools_as_text
from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import DataError

ASK, SAY, NO = ({"role": r, "content": c} for r, c in (("user", "how?"), ("assistant", "so."), ("assistant", "no.")))
SYSTEM = {"role": "system", "content": "be brief"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
END = 256  # of the byte tokenizer

ANSWERS: list[tuple[Any, Any]] = [
    ({"messages": [ASK, SAY]}, Talk([ASK, SAY])),
    ({"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so."}]}, Talk([ASK, SAY])),
    ({"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so."}], "system": "be brief"},
     Talk([SYSTEM, ASK, SAY])),
    ({"instruction": "how?", "input": "", "output": "so."}, Talk([ASK, SAY])),
    ({"instruction": "how", "input": "much?", "output": "so.", "system": "be brief"},
     Talk([SYSTEM, {**ASK, "content": "how\n\nmuch?"}, SAY])),
    ({"instruction": "how?", "output": "so.", "history": [["how?", "no."]]}, Talk([ASK, NO, ASK, SAY])),
    ({"prompt": "how?", "completion": " so."}, Passage("how?", " so.")),
    ({"prompt": [ASK], "completion": [SAY]}, Talk([ASK, SAY], 1)),
    ({"prompt": [SYSTEM, ASK], "completion": "so."}, Talk([SYSTEM, ASK, SAY], 2)),
    ({"prompt": "how?", "completion": [SAY], "system": "be brief"}, Talk([SYSTEM, ASK, SAY], 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "answer"), ANSWERS, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_answers(record, answer):
    assert kind_of(record) == "answer" and answer_of(record) == answer
    judged = record | {"label": False}
    assert kind_of(judged) == "judged" and answer_of(judged) == answer


PAIRS: list[tuple[Any, Any]] = [
    ({"prompt": "how?", "chosen": " so.", "rejected": " no."}, (Passage("how?", " so."), Passage("how?", " no."))),
    ({"chosen": "how? so.", "rejected": "how? no."}, (Passage("how?", " so."), Passage("how?", " no."))),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [NO]}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"prompt": "how?", "chosen": [SAY], "rejected": [NO]}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"prompt": "how?", "chosen": [ASK, SAY], "rejected": [ASK, NO]}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"prompt": [ASK], "chosen": "so.", "rejected": "no."}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"chosen": [ASK, SAY], "rejected": [ASK, NO]}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"chosen": [ASK, SAY, ASK, NO], "rejected": [ASK, SAY, ASK, SAY]},
     (Talk([ASK, SAY, ASK, NO], 3), Talk([ASK, SAY, ASK, SAY], 3))),
    ({"conversations": [{"from": "human", "value": "how?"}], "chosen": {"from": "gpt", "value": "so."},
      "rejected": {"from": "gpt", "value": "no."}}, (Talk([ASK, SAY], 1), Talk([ASK, NO], 1))),
    ({"instruction": "how?", "input": "", "chosen": "so.", "rejected": "no."},
     (Passage("how?", "so."), Passage("how?", "no."))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "sides"), PAIRS)
def test_pairs_keep_their_prompt(record, sides):
    assert kind_of(record) == "pair" and pair_of(record) == sides


def test_two_questions_are_refused():
    with pytest.raises(ValueError, match="'chosen' begins with another question than field 'prompt' holds"):
        pair_of({"prompt": "why?", "chosen": [ASK, SAY], "rejected": [ASK, NO]})


@pytest.mark.parametrize("record", [{"question": "?", "response": "!"}, ["text"], {}, {"prompt": "how?"}])
def test_unknown_forms_are_refused_with_what_was_found(record):
    with pytest.raises(ValueError) as error:
        kind_of(record)
    said = str(error.value)
    assert '{"messages": [{"role": "user"' in said and '"chosen": "..."' in said
    assert ("question, response" in said) == ("question" in record)


def test_tools_become_text_where_the_template_does_not_know_them():
    tool, call = {"name": "add"}, {"function": {"name": "add", "arguments": {"a": 1}}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    talk = answer_of(
        {"messages": [ASK, called, {"from": "observation", "value": "2"}, SAY], "tools": json.dumps([tool])}
    )
    assert talk.tools == (tool,) and [turn["role"] for turn in talk.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    told = tools_as_text(talk.messages, talk.tools, TEMPLATE)
    assert told[0] == {"role": "system", "content": 'Tools:\n{"name": "add"}'}
    assert told[2]["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    knowing = TEMPLATE + "{% if tools %}{{ tools[0].name }}{% endif %}{% if message.tool_calls %}{% endif %}"
    assert tools_as_text(talk.messages, talk.tools, knowing) == talk.messages
    ids, _ = encode_answer(Talk([ASK, SAY], 1, (tool,)), Chat("{{ tools[0].name }}" + TEMPLATE), ByteTokenizer("bytes"))
    assert bytes(ids[:-1]).decode() == "add<u>how?\n<a>so.\n"


def test_strings_are_one_text_unless_a_template_is_asked_for():
    words = ByteTokenizer("bytes")
    ids, labels = encode_answer(Passage("how?", " so."), Chat(TEMPLATE), words)
    assert bytes(ids[:-1]) == b"how? so." and labels == [-100] * 4 + ids[4:] and ids[-1] == END
    ids, labels = encode_answer(Passage("how?", "so."), Chat(TEMPLATE, strings_as_turns=True), words)
    assert bytes(ids[:-1]) == b"<u>how?\n<a>so.\n" and labels.count(-100) == len("<u>how?\n<a>")
    with pytest.raises(ValueError, match="a completion without text"):
        encode_answer(Passage("how?", ""), Chat(TEMPLATE), NoEnd("bytes"))


class NoEnd(ByteTokenizer):
    """Texts end with nothing."""

    eod_id = property(lambda self: None, lambda self, value: None)  # type: ignore[assignment]


def write(folder: Path, name: str, records: list[Any]) -> Path:
    path = folder / name
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(each) + "\n" for each in records)
    path.write_text(text)
    return path


def test_files_of_mixed_forms_become_corpora(tmp_path):
    bytes_ = TokenizerConfig(kind="bytes")
    for name in ("a.jsonl", "a.json"):
        path = write(tmp_path, name, [record for record, _ in ANSWERS])
        recipe = Recipe(bytes_, ("answer",), chat=Chat(TEMPLATE), kind="answer")
        texts, labels = prepare([path], tmp_path / f"out{path.suffix}", recipe).outputs
        assert len(open_dataset(texts)) == len(ANSWERS)
        assert all((item != -100).any() for item in open_dataset(labels))
    path = write(tmp_path, "judged.jsonl", [ANSWERS[0][0] | {"label": True}, ANSWERS[6][0] | {"label": False}])
    recipe = Recipe(bytes_, ("answer",), chat=Chat(TEMPLATE), kind="judged", reward="label")
    *_, rewards = prepare([path], tmp_path / "judged", recipe).outputs
    assert [item.tolist() for item in open_dataset(rewards)] == [[1], [-1]]
    path = write(tmp_path, "mixed.jsonl", [PAIRS[0][0], ANSWERS[0][0]])
    recipe = Recipe(bytes_, ("chosen", "rejected"), chat=Chat(TEMPLATE), kind="pair")
    with pytest.raises(DataError, match=r"mixed.jsonl:2: an answer among records that are a pair"):
        prepare([path], tmp_path / "mixed", recipe)
    skipping = Recipe(bytes_, ("chosen", "rejected"), chat=Chat(TEMPLATE), kind="pair", skip_bad=True)
    assert prepare([path], tmp_path / "some", skipping).documents == 1


def test_columns_of_parquet(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist([{"messages": [ASK, SAY]}] * 3), tmp_path / "chat.parquet")
    recipe = Recipe(TokenizerConfig(kind="bytes"), ("answer",), chat=Chat(TEMPLATE), kind="answer")
    texts, _ = prepare([tmp_path / "chat.parquet"], tmp_path / "out", recipe).outputs
    assert bytes(open_dataset(texts)[2][:-1].tolist()) == b"<u>how?\n<a>so.\n"


@pytest.mark.parametrize("prompt", ["how?", [ASK]])
def test_fields_by_name_keep_their_prompt_as_strings_too(tmp_path, prompt):
    path = write(tmp_path, "p.jsonl", [{"prompt": prompt, "chosen": "so.", "rejected": "no."}])
    recipe = Recipe(TokenizerConfig(kind="bytes"), ("chosen", "rejected"), chat=Chat(TEMPLATE))
    for corpus in prepare([path], tmp_path / "p", recipe).outputs[::2]:
        assert b"how?" in bytes(open_dataset(corpus)[0][:-1].tolist())
