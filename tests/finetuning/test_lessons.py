"""Files as corpora, and what is held out of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castalia.data.chat import Chat
from castalia.data.indexed import open_dataset
from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import DataError
from castalia.finetuning.lessons import (
    PLAIN_TEMPLATE,
    Lesson,
    divide,
    examples,
    kind_of_file,
    looks_like_data,
    make_lesson,
    template_for,
)


def lesson_of(folder: Path, records: list, kind: str, objective: str = "causal", chat: Chat | None = None) -> Lesson:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    ByteTokenizer("bytes").save(folder / "words")
    chat = chat or Chat(PLAIN_TEMPLATE)
    return make_lesson(
        folder / "data.jsonl", kind, folder / "x0", folder / "words", chat, objective, False, lambda *_: None
    )


def spelled(prefix: str) -> list[str]:
    return [bytes(token for token in item.tolist() if 0 <= token < 256).decode() for item in open_dataset(prefix)]


def test_a_twentieth_is_held_out_and_what_is_equal_stays_together(tmp_path):
    records = [{"prompt": f"{n // 2}?", "completion": f" {n}"} for n in range(200)]
    kept, held = divide(lesson := lesson_of(tmp_path, records + records[:50], "answer"), tmp_path / "x0")
    texts = [spelled(part.sides[0].path) for part in (kept, held)]
    assert sorted(texts[0] + texts[1]) == sorted(spelled(lesson.sides[0].path))
    assert not set(texts[0]) & set(texts[1]) and 10 <= len(texts[1]) <= 16
    assert all(len(text) == len(spelled_labels) for text, spelled_labels in zip(
        open_dataset(held.sides[0].path), open_dataset(held.sides[0].labels), strict=True))  # fmt: skip
    again = divide(lesson, tmp_path / "x0")
    assert spelled(again[1].sides[0].path) == texts[1]


def test_answers_to_one_question_are_on_one_side(tmp_path):
    records = [{"prompt": f"{n // 4}?", "chosen": f" a{n}", "rejected": f" b{n}"} for n in range(200)]
    kept, held = divide(lesson_of(tmp_path, records, "pair", "dpo"), tmp_path / "x0")
    asked = [{text.partition("?")[0] for text in spelled(part.sides[0].path)} for part in (kept, held)]
    assert not asked[0] & asked[1] and len(asked[1]) * 4 == len(spelled(held.sides[0].path))
    chosen, rejected = (spelled(side.path) for side in held.sides)
    assert [text.replace("a", "b") for text in chosen] == rejected


def test_too_few_are_not_divided(tmp_path):
    lesson = lesson_of(tmp_path, [{"prompt": f"{n}?", "completion": "!"} for n in range(19)], "answer")
    assert divide(lesson, tmp_path / "x0") == (lesson, None)


def test_pairs_become_judged_answers_for_kto(tmp_path):
    records = [{"prompt": "how?", "chosen": f" so{n}", "rejected": f" no{n}"} for n in range(3)]
    (side,) = lesson_of(tmp_path, records, "pair", "kto").sides
    assert spelled(side.path) == [f"how? {word}{n}" for n in range(3) for word in ("so", "no")]
    assert [item.tolist() for item in open_dataset(side.rewards)] == [[1], [-1]] * 3


def test_examples_are_what_is_asked_and_what_is_answered(tmp_path):
    talk = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so."}]
    lesson = lesson_of(tmp_path, [{"messages": talk + talk}], "answer")
    (example,) = examples([lesson.source()], 2)
    assert bytes(example.prompt) == b"user: how?\nassistant:" and bytes(example.answer) == b" so.\n"
    text = lesson_of(tmp_path, [{"text": "in the beginning was the word"}], "text")
    (example,) = examples([text.source()], 2)
    assert bytes(example.prompt) == b"in the b" and bytes(example.answer[:6]) == b"eginni"


def test_strings_go_through_a_template_that_is_asked_for(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
                                      "{% if add_generation_prompt %}[a]{% endif %}")  # fmt: skip
    chat = template_for(tmp_path / "t.jinja", ByteTokenizer("bytes"), lambda *_: None)
    (side,) = lesson_of(tmp_path, [{"prompt": "how?", "completion": "so."}], "answer", chat=chat).sides
    assert spelled(side.path) == ["[u]how?[a]so."]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "reward"])
def test_an_objective_takes_what_it_learns_from(tmp_path, objective):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "?", "completion": "!", "label": true}')
    with pytest.raises(DataError, match=f"--objective {objective} learns from .*rejected.*holds a judged answer"):
        kind_of_file(file, objective)
    assert kind_of_file(file, "kto") == "judged"


def test_data_and_configs_are_told_apart(tmp_path):
    (tmp_path / "alpaca.json").write_text('[{"instruction": "?", "output": "!"}]')
    (tmp_path / "run.json").write_text('{"train_iters": 5}')
    assert all(map(looks_like_data, ("a.jsonl", "a.parquet", "a.txt", "a.jsonl.gz", "gone.json")))
    assert looks_like_data(str(tmp_path / "alpaca.json")) and not looks_like_data(str(tmp_path / "run.json"))
    assert not any(map(looks_like_data, ("run.yml", "pythia-14m", "runs/first")))
