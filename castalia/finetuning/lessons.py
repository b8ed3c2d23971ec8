"""Files of records as corpora with labels, and the part of them that is held out to judge the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from castalia.config.schema import Source, Text, TokenizerConfig
from castalia.data.chat import NAMES, Chat, read_template
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import IndexedDataset, bin_path, idx_path, open_dataset
from castalia.data.prepare import Recipe, prepare
from castalia.data.record_forms import EXAMPLES, MESSAGES, Kind, Passage, answer_of, kind_of, pair_of
from castalia.data.sample_index import IGNORE
from castalia.data.sources import BadRecord, chunks
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.evaluate.record_batches import STRINGS
from castalia.files import write_text
from castalia.reading import plain_json

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500  # of the documents, the smaller one
LEAST_TO_DIVIDE = 20  # documents; of fewer nothing is held out
Objective = Literal["causal", "dpo", "kto", "orpo", "reward"]
NEEDS: dict[Objective, tuple[Kind, ...]] = {
    "causal": ("text", "answer"), "dpo": ("pair",), "kto": ("judged", "pair"), "orpo": ("pair",), "reward": ("pair",),
}  # fmt: skip
# The template of a model that has none.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
Say = Callable[[str, str], None]  # a name and a text, for people


class Corpora(NamedTuple):
    """Prefixes of the corpora of one side: tokens, labels (None: every token counts), and rewards of judged texts."""

    path: str
    labels: str | None = None
    rewards: str | None = None

    @property
    def prefixes(self) -> list[str]:
        """Those that exist."""
        return [prefix for prefix in self if prefix]


@dataclass(frozen=True)
class Lesson:
    """A file as corpora: one side, or of pairs the chosen and the rejected one."""

    kind: Kind
    sides: tuple[Corpora, ...]

    def source(self) -> Source:
        """As an entry of data.train or data.valid."""
        first, *others = self.sides
        rejected = Text(path=others[0].path, labels=others[0].labels) if others else None
        return Source(path=first.path, labels=first.labels, rewards=first.rewards, rejected=rejected)


@dataclass(frozen=True)
class Lessons:
    """All files of a run as corpora, training and held-out ones."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    kind: Kind | None  # None: corpora that were given as such


def first_record(path: Path) -> Any:
    """The first JSON value of a file; of other files their beginning as a text. Raises DataError for what is none."""
    chunk = next(chunks([path], ()), None)
    records = (chunk.records or tuple(chunk.lines.split(b"\n"))) if chunk else ()
    record = next((record for record in records if record.strip()), None)
    if chunk and chunk.damage:
        raise DataError(chunk.damage)
    if record is None:
        raise DataError(f"{path}: the file is empty; each line is to be a record such as {EXAMPLES['answer']}")
    if chunk and not chunk.is_json:
        return {"text": record.decode("utf-8", errors="replace")}
    try:
        return plain_json(record)
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON: {error}") from error


def kind_of_file(path: Path, objective: Objective) -> Kind:
    """What the records of a file are. Raises DataError where the objective does not learn from such."""
    try:
        kind = kind_of(first_record(path))
    except ValueError as error:
        raise DataError(f"{path}:1: {error}") from None
    wanted = NEEDS[objective]
    if kind in wanted:
        return kind
    if objective == "causal" and kind == "judged":
        raise DataError(
            f"{path} holds answers with labels, wanted or not: --objective kto learns from both; to learn all of them "
            "as good answers, take the field 'label' out"
        )
    if objective == "causal":
        raise DataError(
            f"{path} holds pairs of a better and a worse answer: say what to make of them with --objective: dpo, orpo "
            "and kto tune the model by them, reward makes a model that judges texts"
        )
    raise DataError(
        f"--objective {objective} learns from {' or '.join(EXAMPLES[each] for each in wanted)}; {path} holds "
        f"{NAMES[kind]} in its first record"
    )


def template_for(given: Path | None, tokenizer: Tokenizer, say: Say) -> Chat:
    """The template that was asked for, through which strings go, too; else the tokenizer's own, else a plain one."""
    if given is not None:
        return Chat(*read_template(given), strings_as_turns=True)
    if tokenizer.folder.template is not None:
        return Chat(tokenizer.folder.template, tuple(tokenizer.folder.special.items()))
    say("template", "the model has none: turns are written as `role: content` (--chat-template)")
    return Chat(PLAIN_TEMPLATE)


def say_of_strings(path: Path, chat: Chat, say: Say) -> None:
    """Tells that a file's prompts and answers are taken as they are, where a model has a template."""
    record = first_record(path)
    answer = pair_of(record)[0] if kind_of(record) == "pair" else answer_of(record)
    if isinstance(answer, Passage) and not chat.strings_as_turns and chat.template != PLAIN_TEMPLATE:
        say("template", f"{path}: {STRINGS}")


def make_lesson(
    path: Path, kind: Kind, prefix: Path, tokenizer: Path, chat: Chat, objective: Objective, skip_bad: bool, say: Say
) -> Lesson:
    """The corpora of a file, written with `prefix`. `tokenizer` is the folder of the model's. Raises DataError."""
    keys = {"text": ("text",), "pair": ("chosen", "rejected")}.get(kind, ("answer",))
    words = TokenizerConfig(path=str(tokenizer))
    recipe = Recipe(words, keys, skip_bad=skip_bad, append_eod=kind == "text")
    if kind != "text":
        reward = "label" if kind == "judged" else None
        form = replace(chat, judged=objective == "reward")
        recipe = Recipe(words, keys, skip_bad=skip_bad, chat=form, kind=kind, reward=reward)
    try:
        report = prepare([path], prefix, recipe)
    except BadRecord as error:
        raise BadRecord(f"{error}, or leave such records out with --skip-bad") from None
    left_out = f"; left out {len(report.bad):,} that cannot be read: {report.bad[0]}" if report.bad else ""
    say("read", f"{path}: {report.documents:,} {WORDS[kind]}, {report.tokens:,} tokens{left_out}")
    names = iter(recipe.outputs)
    corpora = {name: f"{prefix}_{name}_document" for name in names}
    labels = {key: corpora.get(f"{key}_label") for key in keys}
    sides = tuple(Corpora(corpora[key], labels[key], corpora.get(f"{key}_reward")) for key in keys)
    lesson = Lesson(kind, sides)
    return judged_pairs(lesson, prefix) if objective == "kto" and kind == "pair" else lesson


WORDS: dict[Kind, str] = {"text": "texts", "answer": "conversations", "pair": "pairs", "judged": "judged answers"}


def judged_pairs(lesson: Lesson, prefix: Path) -> Lesson:
    """Pairs as judged answers: each chosen one is wanted, each rejected one is not."""
    target = Corpora(f"{prefix}_answer_document", f"{prefix}_answer_label_document", f"{prefix}_answer_reward_document")
    for number, name in enumerate(("path", "labels")):
        sides = [open_dataset(side.prefixes[number]) for side in lesson.sides]
        with DatasetWriter(getattr(target, name), sides[0].dtype) as writer:
            for both in zip(*sides, strict=True):  # chosen, rejected, chosen, ..., as the rewards 1, -1, 1, ... below
                for each in both:
                    writer.add(each)
    with DatasetWriter(str(target.rewards), np.int32) as writer:
        writer.add_many(np.tile(np.array([1, -1], np.int32), len(sides[0])), [1] * 2 * len(sides[0]))
    return Lesson("judged", (target,))


def divide(lesson: Lesson, prefix: Path) -> tuple[Lesson, Lesson | None]:
    """A lesson without the documents that are held out, and these; None where there are too few to divide.

    A hash says which are held out: of a document, or of the question that a preference answers, so that what is equal
    stays together. The corpora of the parts lie beside each other, at `prefix` and the names of the parts.
    """
    first = lesson.sides[0]
    text, labels = open_dataset(first.path), open_dataset(first.labels) if first.labels else None
    if len(text) < LEAST_TO_DIVIDE:
        return lesson, None
    ranks = [_rank(text, labels, number, lesson.kind in ("pair", "judged")) for number in range(len(text))]
    count = min(round(HELD_OUT_SHARE * len(text)), MOST_HELD_OUT)
    limit = sorted(ranks)[max(count, 1) - 1]
    held = [rank <= limit for rank in ranks]
    if all(held):  # most are equal, and nothing would be left to learn
        return lesson, None
    parts = [
        Lesson(lesson.kind, tuple(_selected(side, f"{prefix}_{name}", held, value) for side in lesson.sides))
        for name, value in (("kept", False), ("held_out", True))
    ]
    return parts[0], parts[1]


def _rank(text: IndexedDataset, labels: IndexedDataset | None, number: int, asked_only: bool) -> bytes:
    """A hash of a document, or of what comes before its first label."""
    tokens = text[number]
    if asked_only and labels is not None:
        learned = np.flatnonzero(labels[number] != IGNORE)
        tokens = tokens[: learned[0]] if len(learned) and learned[0] else tokens
    # In one dtype: a corpus's own, by the size of the vocabulary, must not decide what is held out.
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=8).digest()


def _selected(side: Corpora, prefix: str, held: Sequence[bool], value: bool) -> Corpora:
    """Corpora of the documents of a side whose `held` is `value`."""
    written: list[str] = []
    for source in side.prefixes:
        target = f"{prefix}_{Path(source).name.partition('_')[2]}"  # train0_answer_document: without train0
        documents = open_dataset(source)
        with DatasetWriter(target, documents.dtype) as writer:
            for document, is_held in zip(documents, held, strict=True):
                if is_held == value:
                    writer.add(document)
        written.append(target)
    names = [name for name in Corpora._fields if getattr(side, name)]
    return Corpora(**dict(zip(names, written, strict=True)))


def remove(lesson: Lesson) -> None:
    """Removes the corpora of a lesson, which was divided into others."""
    for side in lesson.sides:
        for prefix in side.prefixes:
            bin_path(prefix).unlink(missing_ok=True)
            idx_path(prefix).unlink(missing_ok=True)


class Example(NamedTuple):
    """A document as its prompt and the answer that it holds, both as ids."""

    prompt: list[int]
    answer: list[int]


def examples(sources: Sequence[Source], count: int) -> Iterator[Example]:
    """Different prompts, each with its answer, of the first documents of the sources that have both.

    Of texts the prompt is how they begin.
    """
    shown: set[tuple[int, ...]] = set()
    for source in sources:
        text = open_dataset(source.path)
        labels = open_dataset(source.labels) if source.labels else None
        for number in range(len(text)):
            tokens = text[number].tolist()
            start, end = _answer_span(labels[number]) if labels else (min(8, len(tokens) // 2), len(tokens))
            if 0 < start < end and (prompt := tuple(tokens[:start])) not in shown:
                shown.add(prompt)
                yield Example(tokens[:start], tokens[start:end])
                count -= 1
            if not count:
                return


def _answer_span(labels: np.ndarray) -> tuple[int, int]:
    """Where the first stretch of labels begins and ends; (0, 0) without labels."""
    learned = labels != IGNORE
    if not learned.any():
        return 0, 0
    start = int(learned.argmax())
    rest = ~learned[start:]
    return start, start + int(rest.argmax()) if rest.any() else len(labels)


def looks_like_data(word: str) -> bool:
    """Whether a word of the command line names a file of records: by its ending, or by what it begins with."""
    path = Path(word)
    if path.suffix in (".yml", ".yaml"):
        return False
    if path.suffix in (".jsonl", ".parquet", ".txt", ".md", ".zst", ".gz"):
        return True
    if path.suffix != ".json":
        return False
    if not path.is_file():
        return True
    with path.open("rb") as file:
        start = file.read(4096).lstrip()
    return start[:1] == b"[" or any(f'"{field}"'.encode() in start for field in (*MESSAGES, "prompt", "instruction"))


def remember(file: Path, asked: dict[str, Any], lessons: Lessons) -> None:
    """Writes down that the corpora are complete, and for which command they were made."""
    parts = {name: [source.model_dump() for source in getattr(lessons, name)] for name in ("train", "valid")}
    write_text(file, json.dumps({"asked": asked, "kind": lessons.kind, **parts}, indent=1) + "\n")
