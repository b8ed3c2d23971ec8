"""The two forms in which texts are asked for and answered: completions, and answers in conversations."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from castalia.generate.dialogue import ANSWER_TOKENS
from castalia.serve.answers import WrittenText
from castalia.serve.engine import TextOptions, TokenScore
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.replies import chat_logprobs, completion_logprobs, prompt_logprobs
from castalia.serve.request_fields import (
    DEFAULT_TOKENS,
    ChatFields,
    CompletionFields,
    RequestError,
    check_text,
    read_bias,
    read_prompts,
)
from castalia.serve.request_prompts import chat_ids, prompt_ids_of, room_for


@dataclass(frozen=True)
class Asked:
    """A request for texts, whatever its form."""

    prompts: list[list[int]]
    options: list[TextOptions]  # of each text, prompt by prompt
    echoes: list[str]  # what stands before the texts of each prompt

    @property
    def texts(self) -> list[tuple[list[int], TextOptions]]:
        """The prompt and the options of each text."""
        n = len(self.options) // len(self.prompts)
        return [(self.prompts[number // n], options) for number, options in enumerate(self.options)]


def options_of(fields: CompletionFields | ChatFields, size: int) -> TextOptions:
    """What both forms say of texts. Temperature and top_p are 1 unless told, as in OpenAI's interface."""
    stop = () if fields.stop is None else (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    for text in stop:
        check_text(text, "stop")
    share = fields.top_p or 1.0
    return TextOptions(
        max_tokens=0,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=fields.top_k or 0,
        top_p=0.0 if share == 1.0 else share,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        stop=stop,
        bias=read_bias(fields.logit_bias, size),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        prompt_top=fields.prompt_logprobs,
    )


class CompletionForm:
    """How completions are asked for and answered."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, fields: CompletionFields) -> None:
        self.fields = fields
        self.given = read_prompts(fields.prompt, "prompt")
        self.n = fields.n or 1
        if len(self.given) * self.n > 4096:
            raise RequestError(f"{len(self.given)} prompts with {self.n} texts each are too many", "n")

    async def asked(self, loaded: LoadedModel) -> Asked:
        """The texts to write."""
        fields = self.fields
        prompts = await prompt_ids_of(loaded, self.given, fields.add_special_tokens, "prompt")
        common = replace(options_of(fields, loaded.engine.vocab_size), top=fields.logprobs)
        if fields.echo and fields.logprobs is not None:
            common = replace(common, prompt_top=max(fields.logprobs, fields.prompt_logprobs or 0))
        options = []
        for ids in prompts:
            most = room_for(loaded, ids, fields.max_tokens, DEFAULT_TOKENS, "prompt")
            options += [replace(common, max_tokens=most, number=number) for number in range(self.n)]
        words = loaded.tokenizer
        echoes = [each if isinstance(each, str) else words.decode(each) for each in self.given] if fields.echo else []
        return Asked(prompts, options, echoes or [""] * len(prompts))

    def choice(self, loaded: LoadedModel, number: int, echo: str, part: WrittenText, begins: bool) -> dict[str, Any]:
        """The entry of a text, or of the part of it that a piece of a stream holds."""
        fields, tokenizer = self.fields, loaded.tokenizer
        choice: dict[str, Any] = {"index": number, "text": part.text, "logprobs": None}
        shown = bool(fields.echo) and begins
        if shown:
            choice["text"] = echo + part.text
        if fields.logprobs is not None:
            before: list[TokenScore | None] = [None, *_trimmed(part.prompt_scores, fields.logprobs)] if shown else []
            scores = [*before, *_trimmed(part.scores, fields.logprobs)]
            tokens = [*(part.prompt if shown else []), *part.tokens]
            choice["logprobs"] = completion_logprobs(tokenizer, tokens, scores, part.offsets)
        return choice | _extras(fields, tokenizer, part, begins) | {"finish_reason": part.finish_reason}

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream says before a text."""
        return None


class ChatForm:
    """How answers in conversations are asked for and given."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, fields: ChatFields) -> None:
        self.fields = fields

    async def asked(self, loaded: LoadedModel) -> Asked:
        """The texts to write."""
        fields = self.fields
        ids = await chat_ids(loaded, fields.messages)
        common = options_of(fields, loaded.engine.vocab_size)
        wanted = fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens
        common = replace(
            common,
            max_tokens=room_for(loaded, ids, wanted, ANSWER_TOKENS, "messages"),
            top=(fields.top_logprobs or 0) if fields.logprobs else None,
            stop=(*common.stop, *loaded.turn_ends),
        )
        return Asked([ids], [replace(common, number=number) for number in range(fields.n or 1)], [""])

    def choice(self, loaded: LoadedModel, number: int, echo: str, part: WrittenText, begins: bool) -> dict[str, Any]:
        """The entry of an answer, or of the part of it that a piece of a stream holds."""
        fields = self.fields
        if fields.stream:
            said: dict[str, Any] = {"delta": {"content": part.text} if part.text else {}}
        else:
            said = {"message": {"role": "assistant", "content": part.text}}
        logprobs = chat_logprobs(loaded.tokenizer, part.scores) if fields.logprobs else None
        choice = {"index": number, **said, "logprobs": logprobs, **_extras(fields, loaded.tokenizer, part, begins)}
        return choice | {"finish_reason": part.finish_reason}

    def opening(self, number: int) -> dict[str, Any] | None:
        """The first piece names the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


def _trimmed(scores: Sequence[TokenScore], top: int) -> list[TokenScore]:
    return [score._replace(top=score.top[:top]) for score in scores]


def _extras(fields: CompletionFields | ChatFields, tokenizer: Any, part: WrittenText, begins: bool) -> dict[str, Any]:
    """What vLLM adds on request. Prompts stand in the first piece of a text."""
    extras: dict[str, Any] = {}
    if fields.return_token_ids:
        extras["token_ids"] = part.tokens
        if begins:
            extras["prompt_token_ids"] = part.prompt
    if fields.prompt_logprobs is not None and begins:
        scores = _trimmed(part.prompt_scores, fields.prompt_logprobs)
        extras["prompt_logprobs"] = prompt_logprobs(tokenizer, [None, *scores])
    return extras
