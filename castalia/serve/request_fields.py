"""What clients may send: every field that has an effect, and no other.

A field that is not here, or a value that could not be honoured, is an error with the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from castalia.errors import CastaliaError
from castalia.reading import REASONS, plain_json

MAX_TEXTS = 2048  # that one request may ask for
MAX_ALTERNATIVES = 100  # likely tokens that are told of each token
DEFAULT_TOKENS = 16  # of a completion, as OpenAI's

Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=1 << 30)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class RequestError(CastaliaError):
    """A request that is refused: the status, and in OpenAI's words which field and what kind of error."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class RequestFields(BaseModel):
    """Fields that are all known, with values of the right types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(RequestFields):
    """What a stream tells besides the text."""

    include_usage: bool = False


class _Texts(RequestFields):
    """What both kinds of texts have in common."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    user: str | None = None  # names whom a client asks for, which no text depends on


class CompletionFields(_Texts):
    """`/v1/completions`."""

    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: None = None
    add_special_tokens: bool | None = None


class TextPart(RequestFields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(RequestFields):
    """A turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]


class ResponseFormat(RequestFields):
    """The form of an answer, which is text."""

    type: Literal["text"]


class ChatFields(_Texts):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    tools: None = None


class ScoreFields(RequestFields):
    """`/v1/score`."""

    model: str | None = None
    input: Any
    add_special_tokens: bool | None = None


class TokenizeFields(RequestFields):
    """`/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeFields(RequestFields):
    """`/detokenize`."""

    model: str | None = None
    tokens: Any


Known = TypeVar("Known", bound=RequestFields)


def read_fields(body: bytes, shape: type[Known]) -> Known:
    """The fields of a body of JSON. Raises RequestError."""
    try:
        value = plain_json(body)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """The first problem, with the field's name."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # Of a union each member has its own problem, whose place ends with a word for the member.
    name = next((str(part) for part in first["loc"]), "body")
    inner = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    where = ".".join([name, *(part for part in inner if part not in ("str", "list"))])[:200]
    if first["type"] == "extra_forbidden":
        return RequestError(f"{where!r} is not supported here, and would have no effect", where, code="unsupported")
    reason = REASONS.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
    return RequestError(f"{where!r}: {reason}", where, code="invalid_value")


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


def read_prompts(value: Any, name: str) -> list[str | list[int]]:
    """Texts or lists of token ids from one of either or a list of them. Raises RequestError."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) or _is_ids(each) for each in value):
        raise RequestError(
            f"{name!r} is neither a text nor a list of token ids, nor a list of texts or of such lists", name
        )
    if len(value) > MAX_TEXTS:
        raise RequestError(f"{name!r} has {len(value)} texts; the most is {MAX_TEXTS}", name)
    for text in value:
        if isinstance(text, str):
            check_text(text, name)
    return value


def read_ids(value: Any, name: str) -> list[int]:
    """Token ids. Raises RequestError."""
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise RequestError(f"{name!r} is not a list of token ids", name)
    return value


def check_text(text: str, name: str) -> None:
    """Raises RequestError for half of a surrogate pair, which JSON can write and no text contains."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name!r} is not text at character {error.start}", name) from None


def read_bias(given: Mapping[str, float] | None, size: int) -> dict[int, float]:
    """The bias of each token. Raises RequestError for a key that is no token."""
    for key in given or {}:
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < size):
            raise RequestError(
                f"'logit_bias': {key[:40]!r} is not the id of a token, of which there are {size}", "logit_bias"
            )
    return {int(key): value for key, value in (given or {}).items()}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)
