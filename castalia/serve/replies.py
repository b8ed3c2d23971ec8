"""Answers in the forms that OpenAI's clients read, with vLLM's additions: ids, and log-probabilities of prompts."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from castalia.data.tokenizer import Tokenizer
from castalia.serve.engine import TokenScore
from castalia.serve.token_text import distinct_texts, token_bytes, token_text


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, written: int, note: str | None = None) -> dict[str, Any]:
    """How many tokens were read and written."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written
    }  # fmt: skip
    return counts | ({"warning": note} if note else {})


def top_of(tokenizer: Tokenizer, score: TokenScore) -> dict[str, tuple[int, float]]:
    """The likeliest tokens and the token itself by their texts, each with its id and its log-probability."""
    values = dict([*score.top, (score.token, score.log_prob)])
    return dict(zip(distinct_texts(tokenizer, list(values)), values.items(), strict=True))


class TextOffsets:
    """Where in a text its tokens begin, in characters, as their bytes come."""

    def __init__(self) -> None:
        self.decoder, self.at = getincrementaldecoder("utf-8")("ignore"), 0

    def next(self, content: bytes) -> int:
        """The place of the next token, which has these bytes."""
        begin = self.at
        self.at += len(self.decoder.decode(content))
        return begin


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenScore | None], offsets: TextOffsets
) -> dict[str, Any]:
    """The log-probabilities of a completion's tokens; None for a token that is predicted by nothing.

    `offsets` go on from the tokens before. Besides OpenAI's fields, `token_ids`, `bytes`, and `top_token_ids` with
    the keys of `top_logprobs`, whose order JavaScript does not keep.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
    tops = [score and top_of(tokenizer, score) for score in scores]
    contents = [token_bytes(tokenizer, token) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [score and score.log_prob for score in scores],
        "top_logprobs": [top and {text: value for text, (_, value) in top.items()} for top in tops],
        "top_token_ids": [top and {text: token for text, (token, _) in top.items()} for top in tops],
        "text_offset": [offsets.next(content) for content in contents],
        "token_ids": list(tokens),
        "bytes": [list(content) for content in contents],
    }


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """The log-probabilities of an answer's tokens."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        content = list(token_bytes(tokenizer, token))
        return {"token": token_text(tokenizer, token), "logprob": log_prob, "bytes": content, "token_id": token}

    tops = [[entry(*pair) for pair in score.top] for score in scores]
    return {
        "content": [
            entry(score.token, score.log_prob) | {"top_logprobs": top} for score, top in zip(scores, tops, strict=True)
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore | None]) -> list[Any]:
    """The log-probabilities of a prompt's tokens as vLLM writes them: by id, with ranks; null for the first token."""

    def entries(score: TokenScore) -> dict[str, Any]:
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(score.top, start=1)}
        ranked[score.token] = score.log_prob, score.rank
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": token_text(tokenizer, token)}
            for token, (value, rank) in ranked.items()
        }

    return [score and entries(score) for score in scores]
