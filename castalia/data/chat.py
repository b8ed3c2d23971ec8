"""Conversations to token ids and labels, by the Jinja chat templates of Hugging Face tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from castalia.data.record_forms import (
    Answer,
    Conversation,
    Kind,
    Passage,
    Talk,
    after_prompt,
    answer_of,
    kind_of,
    label_of,
    pair_of,
    tools_as_text,
    turns,
    with_prompt,
)
from castalia.data.sample_index import IGNORE
from castalia.data.sources import SURROGATE, field_of
from castalia.data.template import Rendered, compile_template
from castalia.data.tokenizer import Tokenizer, decode_with_special
from castalia.data.tokenizer_folder import JINJA, SETTINGS, TEMPLATE, read_tokenizer_folder
from castalia.errors import DataError


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes text, and which of its turns are trained on."""

    template: str
    names: tuple[tuple[str, str], ...] = ()  # variables of the template besides the messages: bos_token, eos_token
    role: str = "assistant"  # the role whose turns are trained on
    only_last: bool = False  # train on the last turn only, which must be of that role
    for_rm: bool = False  # for reward models: append two end-of-document ids, and label only the second
    strings_as_turns: bool = False  # prompts and answers that are strings go through the template, too
    judged: bool = False  # for reward models, of records in any form: see `encode_judged`


def read_template(path: str | Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The template and the special tokens of a Jinja file, a tokenizer_config.json, or a folder with either.

    Raises DataError if there is no template.
    """
    path = Path(path)
    given = {SETTINGS if path.suffix == ".json" else JINJA: path}
    if path.is_dir():
        given = {name: path / name for name in (JINJA, SETTINGS, TEMPLATE) if (path / name).is_file()}
    folder = read_tokenizer_folder(given)
    if folder.template is None:
        raise DataError(
            f"no chat template in {path}: give a Jinja file, a tokenizer_config.json with `chat_template`, or a folder "
            "with tokenizer_config.json or chat_template.jinja"
        )
    return folder.template, tuple(folder.special.items())


def chat_of(tokenizer: Tokenizer, given: str | Path | None = None) -> Chat:
    """The chat template in a file or folder, through which strings go, too; else the tokenizer's own.

    Raises DataError if there is none.
    """
    template, special = (tokenizer.folder.template, ()) if given is None else read_template(given)
    if template is None:
        raise DataError(
            "the model has no chat template, so that it is not known how turns become text: give one with "
            "--chat-template, a Jinja file or the folder of a tokenizer that has one"
        )
    names = special or tuple(tokenizer.folder.special.items())
    return Chat(template, names, strings_as_turns=given is not None)


@lru_cache(maxsize=4)
def renderer(chat: Chat) -> Callable[..., Rendered]:
    """A function (messages, flag, tools=()) to text. The flag asks for the beginning of an answer at the end of it.

    Raises DataError if the template is not valid Jinja; the function raises ValueError if it does not render.
    """
    template, content = compile_template(chat.template)

    def render(messages: Conversation, ready: bool, tools: Sequence[Any] = ()) -> Rendered:
        shown = [turn | {"content": content(turn["content"])} for turn in messages]
        values = dict(chat.names) | ({"tools": list(tools)} if tools else {})
        rendered = template(messages=shown, add_generation_prompt=ready, **values)
        if SURROGATE.search(rendered.text):
            raise ValueError("the conversation holds half of a surrogate pair, which no UTF-8 can express")
        return rendered

    return render


def conversations(
    chat: Chat, tokenizer: Tokenizer, reward: str | None = None
) -> Callable[[Any, Sequence[str]], dict[str, Any]]:
    """A `parse` function for `texts_of`: it turns a record into token ids and labels of the conversation in each field.

    With `reward`, the name of a field, the reward of the record follows the labels. The function raises ValueError for
    a field that is not a conversation, has no answer to learn from, or does not render.
    """

    def parse(value: Any, keys: Sequence[str]) -> dict[str, Any]:
        encoded = {}
        for key in keys:
            encoded[key] = encode_answer(_answer_in(value, key), chat, tokenizer)
        if reward is None:
            return encoded
        sign = _reward(field_of(value, reward), reward)
        return {key: (*ids_and_labels, [sign]) for key, ids_and_labels in encoded.items()}

    return parse


def records_of(kind: Kind, chat: Chat, tokenizer: Tokenizer) -> Callable[[Any, Sequence[str]], dict[str, Any]]:
    """As `conversations`, for records in any of the forms of `record_forms`, which must be of one kind.

    There is one key for each answer of a record. The function raises ValueError for records of another kind as well.
    """

    def parse(value: Any, keys: Sequence[str]) -> dict[str, Any]:
        actual = kind_of(value)
        if actual != kind:
            raise ValueError(f"{NAMES[actual]} among records that are {NAMES[kind]}")
        answers = pair_of(value) if kind == "pair" else (answer_of(value),)
        encode = encode_judged if chat.judged else encode_answer
        encoded = (encode(answer, chat, tokenizer) for answer in answers)
        judgement = ([label_of(value)],) if kind == "judged" else ()
        return {key: (*pair, *judgement) for key, pair in zip(keys, encoded, strict=True)}

    return parse


NAMES: dict[Kind, str] = {"text": "a text", "answer": "an answer", "pair": "a pair", "judged": "a judged answer"}


def _reward(value: Any, key: str) -> int:
    """1 for wanted conversations (true, or a number above 0), -1 for unwanted ones."""
    if isinstance(value, bool):
        return 1 if value else -1
    if not isinstance(value, int | float) or not value:
        raise ValueError(f"field {key!r} judges nothing: expected true, false or a number other than 0, not {value!r}")
    return 1 if value > 0 else -1


def _answer_in(record: Any, key: str) -> Answer:
    """What a field holds, after what the field `prompt` holds, of which nothing is learned.

    Raises ValueError if the field is not a list of messages, or if its messages begin with another prompt.
    """
    said = field_of(record, key)
    prompt = record.get("prompt") if isinstance(record, dict) and key != "prompt" else None
    if prompt and isinstance(said, str):
        return after_prompt(record, "prompt", key)
    messages = turns(said, key)
    return with_prompt(prompt, messages, "prompt", key) if prompt else Talk(messages)


def encode_answer(answer: Answer, chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of an answer after its prompt, and labels of the same number, -100 for what is not learned."""
    if isinstance(answer, Passage) and not chat.strings_as_turns:
        return encode_passage(answer, tokenizer)
    answer = _as_talk(answer, chat)
    messages = tools_as_text(answer.messages, answer.tools, chat.template)
    given = answer.given + len(messages) - len(answer.messages)  # a system message may have come
    return encode_chat(messages, chat, tokenizer, given if answer.given else 0, answer.tools)


def judged_ids(answer: Answer, chat: Chat | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of which a reward model judges the last one, as transformers' classes and TRL's RewardTrainer do.

    A conversation is what its template writes; a string ends with the end of a document. Padding at the end does not
    count, where config.json says which token pads: it may be the one that ends documents. `chat` None: for strings.
    """
    if isinstance(answer, Passage) and (chat is None or not chat.strings_as_turns):
        ids = tokenizer.encode(answer.prompt + answer.completion)
        if tokenizer.eod_id is not None and ids[-1:] != [tokenizer.eod_id]:
            ids.append(tokenizer.eod_id)
    else:
        assert chat is not None
        talk = _as_talk(answer, chat)
        shown = tools_as_text(talk.messages, talk.tools, chat.template)
        (ids,) = tokenizer.encode_batch([renderer(chat)(shown, False, talk.tools).text], bare=True)
    padding = tokenizer.folder.token_ids.get("pad_token_id")
    while len(ids) > 1 and ids[-1] == padding:
        ids.pop()
    return ids


def encode_judged(answer: Answer, chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """As `encode_answer`, for the training of reward models, which read the token before the last label.

    So one token follows those of `judged_ids`, and its label is the last one. The labels before it, which nothing
    learns, say where the answer begins.
    """
    ids, (_, labels) = judged_ids(answer, chat, tokenizer), encode_answer(answer, chat, tokenizer)
    labels = (labels + [IGNORE] * len(ids))[: len(ids)]
    return [*ids, ids[-1]], [*labels, ids[-1]]


def _as_talk(answer: Answer, chat: Chat) -> Talk:
    """A prompt and an answer that are strings as two turns; a conversation as it is."""
    if isinstance(answer, Talk):
        return answer
    asked, said = ({"role": role, "content": text} for role, text in zip(("user", chat.role), answer, strict=True))
    return Talk([asked, said], 1)


def encode_passage(passage: Passage, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt and its completion, which are one text, and the end of a document.

    A token that holds letters of both is learned, as in TRL.
    """
    asked, whole = tokenizer.encode_batch([passage.prompt, passage.prompt + passage.completion])
    if tokenizer.eod_id is not None and not _ends(whole, tokenizer):
        whole = [*whole, tokenizer.eod_id]
    known = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(asked, whole, strict=False)))
    if known == len(whole):
        raise ValueError("a completion without text: there is nothing to learn")
    return whole, [IGNORE] * known + whole[known:]


def encode_chat(
    messages: Conversation, chat: Chat, tokenizer: Tokenizer, given: int = 0, tools: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels of the same number, -100 for tokens that are not trained on.

    Trained on are the turns of `chat.role` after the first `given` messages. The text that asks for an answer belongs
    to the turn before the answer. The end of a document follows, unless the template already writes it.

        text     <user> how? <assistant> | fine. <end> | <user> bye. <assistant> | bye. <end>
        labels   -100 ... ............-100  fine. <end>  -100 ................-100  bye. <end>

    The template is rendered up to each bound of such a turn, and the tokens of each of these texts must be a beginning
    of all tokens: then the labels are exact. Raises ValueError if they are not, or if there is no turn to train on.
    """
    render, end = partial(renderer(chat), tools=tools), [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    if chat.for_rm:
        (whole,) = tokenizer.encode_batch([render(messages, False).text], bare=True)
        return whole + 2 * end, [IGNORE] * (len(whole) + 1) + end
    learned = [turn["role"] == chat.role and number >= given for number, turn in enumerate(messages)]
    if chat.only_last:
        learned = [False] * (len(messages) - 1) + learned[-1:]
    if not any(learned):
        where = "at its end" if chat.only_last else "in it"
        raise ValueError(f"a conversation without an answer: no turn of role {chat.role!r} {where}")
    rendered = render(messages, False)
    bounds = _generated(rendered, messages, chat, learned) or _turns(render, messages, chat, learned)
    prefixes = [text for pair in bounds for text in pair]
    *parts, ids = tokenizer.encode_batch([*prefixes, rendered.text], bare=True)
    labels = [IGNORE] * len(ids)
    before: list[int] = []
    for number, now in enumerate([*parts, ids]):
        if now[: len(before)] != before or ids[: len(now)] != now:
            turn = [place for place, learns in enumerate(learned, start=1) if learns][min(number // 2, len(bounds) - 1)]
            raise ValueError(f"turn {turn} changes the tokens of those before it: the template must add turn by turn")
        before = now
    for start, stop in zip(parts[::2], parts[1::2], strict=True):
        labels[len(start) : len(stop)] = ids[len(start) : len(stop)]
    if _ends(ids, tokenizer):
        return ids, labels
    return ids + end, labels + (end if learned[-1] else [IGNORE] * len(end))


def _ends(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the ids contain the end of a document, followed by whitespace at most."""
    if tokenizer.eod_id not in ids:
        return False
    last = len(ids) - 1 - ids[::-1].index(tokenizer.eod_id)
    return not decode_with_special(tokenizer, ids[last + 1 :]).strip()


def _turns(
    render: Callable[[Conversation, bool], Rendered], messages: Conversation, chat: Chat, learned: Sequence[bool]
) -> list[tuple[str, str]]:
    """The rendered text up to the begin and up to the end of each turn that is trained on.

    No other beginnings are rendered, as some templates refuse a system message alone, or a question without an answer.
    """
    asked = [after["role"] == chat.role for _, after in pairwise(messages)] + [False]

    def until(turn: int) -> str:
        return render(messages[:turn], asked[turn - 1]).text if turn else ""

    return [(until(turn), until(turn + 1)) for turn, learns in enumerate(learned) if learns]


def _generated(
    rendered: Rendered, messages: Conversation, chat: Chat, learned: Sequence[bool]
) -> list[tuple[str, str]] | None:
    """As `_turns`, by the marks of a template that marks the text of the model itself, if it marks every turn."""
    turns = [learns for turn, learns in zip(messages, learned, strict=True) if turn["role"] == chat.role]
    if len(turns) != len(rendered.generated):
        return None
    spans = [span for span, learns in zip(rendered.generated, turns, strict=True) if learns]
    return [(rendered.text[:start], rendered.text[:stop]) for start, stop in spans]
