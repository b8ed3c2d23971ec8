"""What requests for texts and scores come to: one answer, or the pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from castalia.serve.answers import WrittenText, events_of
from castalia.serve.catalogue import ModelEntry
from castalia.serve.engine import Drawn, TextOptions
from castalia.serve.loaded_models import Library, LoadedModel
from castalia.serve.replies import usage
from castalia.serve.request_fields import ScoreFields
from castalia.serve.request_prompts import prompt_ids_of, room_for
from castalia.serve.text_forms import ChatForm, CompletionForm


async def whole_answer(library: Library, entry: ModelEntry, form: CompletionForm | ChatForm) -> dict[str, Any]:
    """The answer to a request whose texts come at once."""
    async with library.lease(entry) as loaded:
        asked = await form.asked(loaded)
        texts = [WrittenText(prompt) for prompt, _ in asked.texts]
        async with aclosing(events_of(library, loaded, asked.texts)) as events:  # type: ignore[type-var]
            async for number, event in events:
                texts[number].take(event)
        n = len(texts) // len(asked.prompts)
        choices = [
            form.choice(loaded, number, asked.echoes[number // n], text, True) for number, text in enumerate(texts)
        ]
        written = sum(len(text.tokens) for text in texts)
        return _head(form, loaded) | {
            "choices": choices,
            "usage": usage(sum(map(len, asked.prompts)), written, loaded.note),
        }


async def pieces_of_answer(library: Library, entry: ModelEntry, form: CompletionForm | ChatForm) -> AsyncIterator[Any]:
    """The pieces of a stream: one for each token if those are asked for, else whenever there is text to show."""
    fields = form.fields
    told = fields.stream_options is not None and fields.stream_options.include_usage
    async with library.lease(entry) as loaded:
        asked = await form.asked(loaded)
        n = len(asked.options) // len(asked.prompts)
        head = _head(form, loaded, stream=True) | ({"usage": None} if told else {})
        every = bool(fields.return_token_ids) or fields.logprobs not in (None, False)
        parts = [WrittenText(prompt) for prompt, _ in asked.texts]
        begun, written = [False] * len(parts), 0
        async with aclosing(events_of(library, loaded, asked.texts)) as events:  # type: ignore[type-var]
            async for number, event in events:
                part = parts[number]
                part.take(event)
                if not isinstance(event, Drawn):
                    continue
                written += event.token is not None
                if not (every or part.text or part.finish_reason):
                    continue
                begins, begun[number] = not begun[number], True
                if begins and (opening := form.opening(number)):
                    yield head | {"choices": [opening]}
                yield head | {"choices": [form.choice(loaded, number, asked.echoes[number // n], part, begins)]}
                parts[number] = part.rest()
        if told:
            total = usage(sum(map(len, asked.prompts)), written, loaded.note)
            yield head | {"choices": [], "usage": total}


def _head(form: CompletionForm | ChatForm, loaded: LoadedModel, stream: bool = False) -> dict[str, Any]:
    kind = form.kind + (".chunk" if stream and form.kind == ChatForm.kind else "")
    number = f"{form.prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": loaded.entry.name}


async def scores_of(
    library: Library, entry: ModelEntry, fields: ScoreFields, given: Sequence[str | list[int]]
) -> dict[str, Any]:
    """The negative log-probability of every token of given texts, in nats; null for the first one."""
    async with library.lease(entry) as loaded:
        prompts = await prompt_ids_of(loaded, given, fields.add_special_tokens, "input")
        for ids in prompts:
            room_for(loaded, ids, 0, 0, "input")
        options = TextOptions(max_tokens=0, prompt_top=0)
        texts = [WrittenText(prompt) for prompt in prompts]
        async with aclosing(events_of(library, loaded, [(ids, options) for ids in prompts])) as events:  # type: ignore[type-var]
            async for number, event in events:
                texts[number].take(event)
        data = [
            {
                "index": number,
                "token_ids": text.prompt,
                "nll": [None, *(-score.log_prob for score in text.prompt_scores)],
            }
            for number, text in enumerate(texts)
        ]
        return {
            "object": "list", "model": loaded.entry.name, "data": data,
            "usage": usage(sum(map(len, prompts)), 0, loaded.note),
        }  # fmt: skip
