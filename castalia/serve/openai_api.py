"""OpenAI's interface, and what clients of vLLM know besides: tokenizing, scores of given texts.

body -> fields -> prompts of ids -> the engine's rows -> events -> choices of one answer, or pieces of a stream
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from castalia.data.chat import Chat
from castalia.data.record_forms import Conversation
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.generate.dialogue import ANSWER_TOKENS, prompt_ids
from castalia.generate.generation import checked_prompt
from castalia.serve.answers import EventStream, WrittenText, events_of
from castalia.serve.catalogue import Catalogue, ModelEntry
from castalia.serve.engine import Drawn, TextOptions, TokenScore
from castalia.serve.library import Library, LoadedModel
from castalia.serve.limits import Limits, body_of, while_connected
from castalia.serve.replies import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    usage,
)
from castalia.serve.request_fields import (
    DEFAULT_TOKENS,
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Message,
    RequestError,
    ScoreFields,
    TextPart,
    TokenizeFields,
    check_text,
    read_bias,
    read_fields,
    read_ids,
    read_prompts,
)
from castalia.strict_json import to_json

RENDERING = threading.Lock()  # a template counts its operations, for one conversation at a time


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


def api_routes(catalogue: Catalogue, library: Library, limits: Limits) -> list[Route]:
    """The routes of OpenAI's interface, and those at the root."""

    def entry_of(name: str | None) -> ModelEntry:
        """The checkpoint that a request means. Raises RequestError for an unknown name."""
        if name is None:
            entries = catalogue.models()
            if len({entry.source for entry in entries}) != 1:
                raise RequestError("'model' is missing: name one of GET /v1/models", "model")
            return entries[-1]
        entry = catalogue.find(name)
        if entry is None:
            raise RequestError(
                f"there is no model {name[:200]!r}; GET /v1/models lists them", "model", 404, "model_not_found"
            )
        return entry

    async def models(request: Request) -> Response:
        entries = await anyio.to_thread.run_sync(catalogue.models)
        return JSONResponse({"object": "list", "data": [_model(entry) for entry in entries]})

    async def model(request: Request) -> Response:
        return JSONResponse(_model(entry_of(request.path_params["name"])))

    async def completions(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), CompletionFields)
        check_completion(fields)
        form = CompletionForm(fields)
        return await _answer(request, entry_of(fields.model), form)

    async def chat(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), ChatFields)
        check_chat(fields)
        return await _answer(request, entry_of(fields.model), ChatForm(fields))

    async def _answer(request: Request, entry: ModelEntry, form: CompletionForm | ChatForm) -> Response:
        if form.fields.stream:
            return EventStream(lambda: _pieces(library, entry, form), limits.seconds)
        return await _json(request, limits, lambda: _whole(library, entry, form))

    async def score(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), ScoreFields)
        prompts = read_prompts(fields.input, "input")
        entry = entry_of(fields.model)
        return await _json(request, limits, lambda: _scores(library, entry, fields, prompts))

    async def tokenize(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), TokenizeFields)
        if (fields.prompt is None) == (fields.messages is None):
            raise RequestError("give either 'prompt' or 'messages'", "prompt")
        async with library.lease(entry_of(fields.model)) as loaded:
            if fields.messages is not None:
                ids = await _chat_ids(loaded, fields.messages)
            else:
                prompt = fields.prompt or ""
                check_text(prompt, "prompt")
                (ids,) = await _encoded(loaded, [prompt], fields.add_special_tokens)
            return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": loaded.plan.length})

    async def detokenize(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), DetokenizeFields)
        ids = read_ids(fields.tokens, "tokens")
        async with library.lease(entry_of(fields.model)) as loaded:
            size = loaded.tokenizer.vocab_size
            if ids and max(ids) >= size:
                raise RequestError(f"'tokens' has {max(ids)}; the tokenizer knows ids below {size}", "tokens")
            return JSONResponse({"prompt": await anyio.to_thread.run_sync(loaded.tokenizer.decode, ids)})

    async def tokenizer_info(request: Request) -> Response:
        async with library.lease(entry_of(request.query_params.get("model"))) as loaded:
            tokenizer = loaded.tokenizer
            special = tokenizer.folder.special
            end = None if tokenizer.eod_id is None else tokenizer.token(tokenizer.eod_id)
            begin = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
            return JSONResponse(
                {
                    "model": loaded.entry.name,
                    "kind": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "eos_token": special.get("eos_token", end),
                    "bos_token": special.get("bos_token", begin),
                    "pad_token": special.get("pad_token"),
                    "chat_template": tokenizer.folder.template,
                }
            )

    async def metrics(request: Request) -> Response:
        return PlainTextResponse("\n".join(_metrics(library)) + "\n")

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/score", score, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/metrics", metrics),
    ]


async def _json(request: Request, limits: Limits, work: Any) -> Response:
    """The result of some work as JSON, unless the client goes or the time is over."""
    results: list[Any] = []

    async def keep() -> None:
        results.append(await work())

    await while_connected(request.receive, limits.seconds, keep)
    return Response(to_json(results[0]), media_type="application/json")


def _model(entry: ModelEntry) -> dict[str, Any]:
    created = int(Path(entry.path).stat().st_mtime) if Path(entry.path).exists() else 0
    return {
        "id": entry.name, "object": "model", "created": created, "owned_by": "castalia",
        "root": entry.source, "step": entry.step,
    }  # fmt: skip


async def _encoded(loaded: LoadedModel, texts: Sequence[str], special: bool | None) -> list[list[int]]:
    """Ids of texts, with what the tokenizer puts at their beginning and end unless that is not wanted."""
    bare = special is False
    return await anyio.to_thread.run_sync(lambda: loaded.tokenizer.encode_batch(list(texts), bare=bare))


async def _prompt_ids(
    loaded: LoadedModel, prompts: Sequence[str | list[int]], special: bool | None, name: str
) -> list[list[int]]:
    """Checked ids of texts or ids of the field `name`. Raises RequestError for what the model cannot take."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await _encoded(loaded, texts, special) if texts else [])
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [_checked(loaded, each, name) for each in ids]


def _checked(loaded: LoadedModel, ids: list[int], name: str) -> list[int]:
    size = loaded.tokenizer.vocab_size
    if ids and max(ids) >= size:  # a row of the model may still fill up the vocabulary there
        raise RequestError(f"{name!r} has token {max(ids)}; the tokenizer knows ids below {size}", name)
    try:
        return checked_prompt(loaded.model, loaded.tokenizer, ids)
    except DataError as error:
        raise RequestError(str(error), name) from error


async def _chat_ids(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
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
    return _checked(loaded, ids, "messages")


def _rendered(turns: Conversation, chat: Chat, tokenizer: Tokenizer) -> list[int]:
    with RENDERING:
        return prompt_ids(turns, chat, tokenizer)


def _texts(parts: Sequence[TextPart]) -> list[str]:
    return [part.text for part in parts]


def _room(loaded: LoadedModel, ids: Sequence[int], wanted: int | None, default: int, name: str) -> int:
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


def _options(fields: CompletionFields | ChatFields, size: int) -> TextOptions:
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


def check_completion(fields: CompletionFields) -> None:
    """Raises RequestError for fields that go with none of the others, or that ask for too many texts."""
    n = fields.n or 1
    if fields.best_of not in (None, n):
        raise RequestError("'best_of' is not supported here, unless it equals 'n'", "best_of", code="unsupported")
    _check_stream(fields)


def check_chat(fields: ChatFields) -> None:
    """Raises RequestError for fields that go with none of the others."""
    if fields.top_logprobs and not fields.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    if None not in (fields.max_tokens, fields.max_completion_tokens) and fields.max_tokens != (
        fields.max_completion_tokens
    ):
        raise RequestError("'max_tokens' and 'max_completion_tokens' differ; give one", "max_tokens")
    _check_stream(fields)


def _check_stream(fields: CompletionFields | ChatFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise RequestError("'stream_options' needs 'stream': true", "stream_options")


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
        prompts = await _prompt_ids(loaded, self.given, fields.add_special_tokens, "prompt")
        common = replace(_options(fields, loaded.engine.vocab_size), top=fields.logprobs)
        if fields.echo and fields.logprobs is not None:
            common = replace(common, prompt_top=max(fields.logprobs, fields.prompt_logprobs or 0))
        options = []
        for ids in prompts:
            most = _room(loaded, ids, fields.max_tokens, DEFAULT_TOKENS, "prompt")
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
            choice["logprobs"] = completion_logprobs(tokenizer, tokens, scores, 0)
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
        ids = await _chat_ids(loaded, fields.messages)
        common = _options(fields, loaded.engine.vocab_size)
        wanted = fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens
        common = replace(
            common,
            max_tokens=_room(loaded, ids, wanted, ANSWER_TOKENS, "messages"),
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


async def _whole(library: Library, entry: ModelEntry, form: CompletionForm | ChatForm) -> dict[str, Any]:
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


async def _pieces(library: Library, entry: ModelEntry, form: CompletionForm | ChatForm) -> AsyncIterator[Any]:
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
                parts[number] = WrittenText(part.prompt)
        if told:
            total = usage(sum(map(len, asked.prompts)), written, loaded.note)
            yield head | {"choices": [], "usage": total}


def _head(form: CompletionForm | ChatForm, loaded: LoadedModel, stream: bool = False) -> dict[str, Any]:
    kind = form.kind + (".chunk" if stream and form.kind == ChatForm.kind else "")
    number = f"{form.prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": loaded.entry.name}


async def _scores(
    library: Library, entry: ModelEntry, fields: ScoreFields, given: Sequence[str | list[int]]
) -> dict[str, Any]:
    """The negative log-probability of every token of given texts, in nats; null for the first one."""
    async with library.lease(entry) as loaded:
        prompts = await _prompt_ids(loaded, given, fields.add_special_tokens, "input")
        for ids in prompts:
            _room(loaded, ids, 0, 0, "input")
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


def _metrics(library: Library) -> list[str]:
    """Figures in the form of Prometheus."""
    lines = [f"castalia_memory_bytes {library.memory}", f"castalia_memory_used_bytes {library.used}"]
    for loaded in list(library.loaded.values()):
        engine, label = loaded.engine, f'{{model="{_escaped(loaded.entry.name)}"}}'
        gauges = {
            "writing": len(engine.writing),
            "filling": len(engine.filling),
            "waiting": sum(map(len, list(engine.waiting))),
            "kv_bytes": engine.kv_bytes,
            "kv_budget_bytes": engine.plan.kv_budget,
            "prefix_bytes": engine.prefixes.bytes,
        }
        lines += [f"castalia_{name}{label} {value}" for name, value in gauges.items()]
        lines += [f"castalia_{name}_total{label} {value}" for name, value in engine.counters.items()]
    return lines


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
