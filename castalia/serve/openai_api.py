"""OpenAI's interface, and what clients of vLLM know besides: tokenizing, scores of given texts.

body -> fields -> prompts of ids -> the engine's rows -> events -> choices of one answer, or pieces of a stream
     request_fields  request_prompts    engine                answer_writing, in one of the text_forms
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from castalia.serve.answer_writing import pieces_of_answer, scores_of, whole_answer
from castalia.serve.answers import EventStream
from castalia.serve.catalogue import Catalogue, ModelEntry
from castalia.serve.limits import Limits, body_of, json_within
from castalia.serve.loaded_models import Library
from castalia.serve.request_fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    RequestError,
    ScoreFields,
    TokenizeFields,
    check_chat,
    check_completion,
    check_text,
    read_fields,
    read_ids,
    read_prompts,
)
from castalia.serve.request_prompts import chat_ids, encoded
from castalia.serve.text_forms import ChatForm, CompletionForm


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
            return EventStream(lambda: pieces_of_answer(library, entry, form), limits.seconds)
        return await json_within(request, limits, lambda: whole_answer(library, entry, form))

    async def score(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), ScoreFields)
        prompts = read_prompts(fields.input, "input")
        entry = entry_of(fields.model)
        return await json_within(request, limits, lambda: scores_of(library, entry, fields, prompts))

    async def tokenize(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), TokenizeFields)
        if (fields.prompt is None) == (fields.messages is None):
            raise RequestError("give either 'prompt' or 'messages'", "prompt")
        prompt = fields.prompt or ""
        check_text(prompt, "prompt")
        entry = entry_of(fields.model)

        async def work() -> Any:
            async with library.lease(entry) as loaded:
                if fields.messages is not None:
                    ids = await chat_ids(loaded, fields.messages)
                else:
                    (ids,) = await encoded(loaded, [prompt], fields.add_special_tokens)
                return {"tokens": ids, "count": len(ids), "max_model_len": loaded.plan.longest}

        return await json_within(request, limits, work)

    async def detokenize(request: Request) -> Response:
        fields = read_fields(await body_of(request, limits), DetokenizeFields)
        ids, entry = read_ids(fields.tokens, "tokens"), entry_of(fields.model)

        async def work() -> Any:
            async with library.lease(entry) as loaded:
                size = loaded.tokenizer.vocab_size
                if ids and max(ids) >= size:
                    raise RequestError(f"'tokens' has {max(ids)}; the tokenizer knows ids below {size}", "tokens")
                return {"prompt": await anyio.to_thread.run_sync(loaded.tokenizer.decode, ids)}

        return await json_within(request, limits, work)

    async def tokenizer_info(request: Request) -> Response:
        entry = entry_of(request.query_params.get("model"))

        async def work() -> Any:
            async with library.lease(entry) as loaded:
                tokenizer = loaded.tokenizer
                special = tokenizer.folder.special
                end = None if tokenizer.eod_id is None else tokenizer.token(tokenizer.eod_id)
                begin = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
                return {
                    "model": loaded.entry.name,
                    "kind": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "eos_token": special.get("eos_token", end),
                    "bos_token": special.get("bos_token", begin),
                    "pad_token": special.get("pad_token"),
                    "chat_template": tokenizer.folder.template,
                    "max_model_len": loaded.plan.longest,
                }

        return await json_within(request, limits, work)

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


def _model(entry: ModelEntry) -> dict[str, Any]:
    created = int(Path(entry.path).stat().st_mtime) if Path(entry.path).exists() else 0
    return {
        "id": entry.name, "object": "model", "created": created, "owned_by": "castalia",
        "root": entry.source, "step": entry.step,
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
