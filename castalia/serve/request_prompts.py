"""From what a client gives to token ids that the model takes, and how many tokens have room behind them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio.to_thread

from castalia.data.chat import Chat
from castalia.data.record_forms import Conversation
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.generate.dialogue import prompt_ids
from castalia.generate.generation import checked_prompt
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.request_fields import Message, RequestError, TextPart, check_text

RENDERING = threading.Lock()  # a template counts its operations, for one conversation at a time


async def encoded(loaded: LoadedModel, texts: Sequence[str], special: bool | None) -> list[list[int]]:
    """Ids of texts, with what the tokenizer puts at their beginning and end unless that is not wanted."""
    bare = special is False
    return await anyio.to_thread.run_sync(lambda: loaded.tokenizer.encode_batch(list(texts), bare=bare))


async def prompt_ids_of(
    loaded: LoadedModel, prompts: Sequence[str | list[int]], special: bool | None, name: str
) -> list[list[int]]:
    """Checked ids of texts or ids of the field `name`. Raises RequestError for what the model cannot take."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    new = iter(await encoded(loaded, texts, special) if texts else [])
    ids = [next(new) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [checked_ids(loaded, each, name) for each in ids]


def checked_ids(loaded: LoadedModel, ids: list[int], name: str) -> list[int]:
    """The ids of a prompt, which has a token at least. Raises RequestError for what the model cannot take."""
    size = loaded.tokenizer.vocab_size
    if ids and max(ids) >= size:  # a row of the model may still fill up the vocabulary there
        raise RequestError(f"{name!r} has token {max(ids)}; the tokenizer knows ids below {size}", name)
    try:
        return checked_prompt(loaded.model, loaded.tokenizer, ids)
    except DataError as error:
        raise RequestError(str(error), name) from error


async def chat_ids(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to the next answer. Raises RequestError without a template."""
    chat = loaded.chat
    if chat is None:
        raise RequestError(
            f"{loaded.entry.name} has no chat template, so that it is not known how turns become text; use "
            "/v1/completions", "messages",
        )  # fmt: skip
    turns: Conversation = []
    for message in messages:
        content = message.content if isinstance(message.content, str) else "".join(_texts(message.content))
        check_text(content, "messages")
        turns.append({"role": message.role, "content": content})
    try:
        ids = await anyio.to_thread.run_sync(_rendered, turns, chat, loaded.tokenizer)
    except DataError as error:
        raise RequestError(str(error), "messages") from error
    return checked_ids(loaded, ids, "messages")


def _rendered(turns: Conversation, chat: Chat, tokenizer: Tokenizer) -> list[int]:
    with RENDERING:
        return prompt_ids(turns, chat, tokenizer)


def _texts(parts: Sequence[TextPart]) -> list[str]:
    return [part.text for part in parts]


def room_for(loaded: LoadedModel, ids: Sequence[int], wanted: int | None, default: int, name: str) -> int:
    """How many tokens a text may have. Raises RequestError where those that are wanted have no room."""
    limit = loaded.plan.longest
    room = limit - len(ids) + 1  # the last token of the text is never read, those of the prompt all are
    most = max(0, min(default, room)) if wanted is None else wanted
    if most > room or room < 1:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and the text would have {most}; the model takes {limit} together",
            name, code="context_length_exceeded",
        )  # fmt: skip
    return most
