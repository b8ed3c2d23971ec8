"""Files of records as batches to evaluate: answers, pairs and judged answers, in every form that fine-tuning reads.

file -> Record: a document for each answer -> Batch, of whose labels those that do not count are -100
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.data.chat import NAMES, chat_of, encode_answer, encode_passage, judged_ids
from castalia.data.loader import Batch
from castalia.data.record_forms import Answer, Kind, Passage, answer_of, kind_of, label_of, pair_of
from castalia.data.sample_index import IGNORE
from castalia.data.sources import chunks, texts_of
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError


class LabelledDocument(NamedTuple):
    """Token ids, and for each the label that it is: itself, or -100 if it does not count."""

    ids: list[int]
    labels: list[int]


class Record(NamedTuple):
    """A record of a file: its fields, and a document for each answer in it. Of pairs the chosen one comes first."""

    kind: Kind
    documents: tuple[LabelledDocument, ...]
    fields: dict[str, Any]

    @property
    def wanted(self) -> bool:
        """Whether a judged answer is wanted."""
        return label_of(self.fields) > 0


Encode = Callable[[Answer], LabelledDocument]
STRINGS = (
    "prompts and answers are strings, taken as one text, as TRL does; --chat-template makes turns of them, and so does "
    "a list of messages"
)


def answers_encoder(tokenizer: Tokenizer, template: Path | None) -> Encode:
    """Documents of which the answers count, as in fine-tuning. `template`: in place of the tokenizer's own."""

    def encode(answer: Answer) -> LabelledDocument:
        """Without a template of their own, strings are one text."""
        if isinstance(answer, Passage) and template is None:
            return LabelledDocument(*encode_passage(answer, tokenizer))
        return LabelledDocument(*encode_answer(answer, chat_of(tokenizer, template), tokenizer))

    return encode


def rewards_encoder(tokenizer: Tokenizer, template: Path | None) -> Encode:
    """Documents that a reward model judges: the one label that counts makes it read the token before, the last one."""

    def encode(answer: Answer) -> LabelledDocument:
        """A label needs a token, so one more follows."""
        plain = isinstance(answer, Passage) and template is None
        ids = judged_ids(answer, None if plain else chat_of(tokenizer, template), tokenizer)
        return LabelledDocument([*ids, ids[-1]], [IGNORE] * len(ids) + [ids[-1]])

    return encode


def kind_of_file(path: str | Path) -> Kind:
    """What the first record of a file is. Raises DataError for a record of no kind that is known."""
    if Path(path).is_dir():
        return "text"
    for chunk in chunks([Path(path)], ()):
        if not chunk.is_json:
            return "text"
        kinds = texts_of(chunk, ("kind",), parse=lambda value, keys: {"kind": kind_of(value)}).texts["kind"]
        if kinds:
            return kinds[0]
    raise DataError(f"{path}: the file holds no record")


def record_of(value: Any, encode: Encode) -> Record:
    """One record, of any kind. Raises ValueError for a record of no kind that is known."""
    kind = kind_of(value)
    if kind == "text":
        answers: tuple[Answer, ...] = (Passage("", value["text"]),)
    else:
        answers = pair_of(value) if kind == "pair" else (answer_of(value),)
    return Record(kind, tuple(map(encode, answers)), value)


def read_records(path: str | Path, encode: Encode) -> list[Record]:
    """All records of a file, which are of one kind. Raises DataError, with file and line, for any other."""
    first = kind_of_file(path)

    def parse(value: Any, keys: Sequence[str]) -> dict[str, Record]:
        if (kind := kind_of(value)) != first:
            raise ValueError(f"{NAMES[kind]} among records that are {NAMES[first]}")
        return dict.fromkeys(keys, record_of(value, encode))

    return [record for chunk in chunks([Path(path)], ()) for record in texts_of(chunk, ("",), parse=parse).texts[""]]


def template_note(records: Sequence[Record], tokenizer: Tokenizer, template: Path | None) -> str | None:
    """That prompts and answers are taken as they are, where that is so and the model has a template; else None."""
    kind, _, fields = records[0]
    if kind == "text" or template is not None or tokenizer.folder.template is None:
        return None
    answer = pair_of(fields)[0] if kind == "pair" else answer_of(fields)
    return STRINGS if isinstance(answer, Passage) else None


def within(records: Sequence[Record], length: int) -> list[Record]:
    """The records of which each document has a label that counts among its first `length` + 1 tokens."""
    return [
        record
        for record in records
        if all(any(label != IGNORE for label in document.labels[1 : length + 1]) for document in record.documents)
    ]


def record_batches(records: Sequence[Record], rows: int, length: int, has_whole: bool = False) -> Iterator[Batch]:
    """Batches of about `rows` sequences [sequences, at most `length`], the documents of a record side by side.

    `rewards` is 1 for chosen and wanted answers and -1 for others. `has_whole`: with the labels of all tokens.
    """
    remaining = iter(records)
    while part := list(islice(remaining, max(1, rows // len(records[0].documents)))):
        documents = [document for record in part for document in record.documents]
        width = min(length + 1, max(len(document.ids) for document in documents))
        text, labels, whole = (np.full((len(documents), width), fill, np.int64) for fill in (0, IGNORE, IGNORE))
        for row, (ids, counted) in enumerate(documents):
            size = min(len(ids), width)
            text[row, :size], labels[row, :size], whole[row, :size] = ids[:size], counted[:size], ids[:size]
        signs = [sign for record in part for sign in _signs(record)]
        shifted = labels[:, 1:].copy()
        yield Batch(
            tokens=text[:, :-1].copy(),
            labels=shifted,
            loss_mask=shifted != IGNORE,
            rewards=np.array(signs, np.float32),
            whole=whole[:, 1:].copy() if has_whole else None,
        )


def _signs(record: Record) -> tuple[int, ...]:
    if record.kind == "pair":
        return 1, -1
    return (1 if record.kind != "judged" or record.wanted else -1,)


def on_all_tokens(batch: Batch) -> Batch:
    """The batch with every token of its texts as a label. It must have been made with `whole`."""
    assert batch.whole is not None
    return batch._replace(labels=batch.whole, loss_mask=batch.whole != IGNORE, whole=None)
