"""Conversations with a model: turns become text by its chat template, and an answer ends where the turn does.

messages -> chat template -> ids -> generation.stream -> the answer, which joins the messages
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from castalia.data.chat import Chat, renderer
from castalia.data.record_forms import Conversation
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.generate.generation import AnyModel, Sampling, TextPiece, stream

ANSWER_TOKENS = 512  # of an answer, where nothing says how many; in most answers the turn ends before
NO_LIMIT = 1 << 20  # tokens of a conversation, for a model without a last position
# Contents that no template writes by itself, so that the text between them is the template's.
QUESTION, ANSWER, AGAIN = "qvxq-1", "qvxq-2", "qvxq-3"


def prompt_ids(messages: Conversation, chat: Chat, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation up to where the next answer begins. Raises DataError if it does not render."""
    try:
        text = renderer(chat)(messages, True).text
    except ValueError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"a conversation of these roles, {roles}, cannot be asked: {error}") from error
    return tokenizer.encode_batch([text], bare=True)[0]


def opening(prompt: str, system: str | None) -> Conversation:
    """The messages of a conversation that begins with a prompt."""
    return [*_system(system), {"role": "user", "content": prompt}]


def _system(text: str | None) -> Conversation:
    return [] if text is None else [{"role": "system", "content": text}]


def turn_ends(chat: Chat, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The strings that end an answer: the first special token after it, else how the template opens the next turn.

        ... <|im_start|>assistant\\nfine<|im_end|>\\n<|im_start|>user\\n ...        "<|im_end|>"
        ... assistant: fine\\nuser: ...                                          "\\nuser:"

    Empty if the template shows nothing of the kind; the ids that end texts end an answer anyway.
    """
    contents = zip(("user", "assistant", "user"), (QUESTION, ANSWER, AGAIN), strict=True)
    try:
        text = renderer(chat)([{"role": role, "content": content} for role, content in contents], False).text
    except ValueError:  # a template for other conversations, of one turn for instance
        return ()
    between, found, _ = text.partition(ANSWER)[2].partition(AGAIN)
    if not found:
        return ()
    folder = tokenizer.folder
    added = (token.content for token in folder.added.values())
    known = {*tokenizer.special_texts.values(), *added, *folder.special.values()}
    # The longest of several that begin at one place.
    first = min(((between.find(token), -len(token), token) for token in known if token in between), default=None)
    end = first[2] if first else between.rstrip()
    return (end,) if end.strip() else ()


class Dialogue:
    """A conversation in progress: what was said so far, and the model that answers."""

    def __init__(
        self, model: AnyModel, tokenizer: Tokenizer, chat: Chat, sampling: Sampling, system: str | None = None
    ) -> None:
        """`sampling` gets the stop strings of the chat template as well."""
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.sampling = replace(sampling, stop=(*sampling.stop, *turn_ends(chat, tokenizer)))
        self.messages: Conversation = _system(system)
        self.answers = 0  # each draws other random numbers
        self.left_out = 0  # of the oldest turns, in the last answer, as the model's positions end

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = self._opening()

    def instruct(self, system: str) -> None:
        """Begin anew with another system message; none if it is empty."""
        self.messages = _system(system or None)

    def ask(self, text: str) -> Iterator[TextPiece]:
        """Add a turn of the user, and yield the pieces of the answer, which joins the messages, even if cut short.

        Raises DataError, with the messages as they were, for a turn that does not render or that is too long.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._ids()
        except DataError:
            self.messages.pop()
            raise
        return self._answer(ids)

    def regenerate(self) -> Iterator[TextPiece]:
        """Another answer in place of the last one. Raises DataError if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise DataError("there is no answer yet that could be written again")
        self.messages.pop()
        return self._answer(self._ids())

    def _opening(self) -> Conversation:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _ids(self) -> list[int]:
        """The ids of the conversation, without its oldest turns where they leave no room for an answer."""
        limit = self.model.cfg.max_positions or NO_LIMIT
        room = max(1, min(self.sampling.max_tokens, limit // 4))
        first = len(self._opening())
        for left_out in range((len(self.messages) - first + 1) // 2):
            kept = self.messages[:first] + self.messages[first + 2 * left_out :]
            ids = prompt_ids(kept, self.chat, self.tokenizer)
            if len(ids) + room <= limit:
                self.left_out = left_out
                return ids
        raise DataError(
            f"this turn alone has {len(ids)} tokens, with what the template puts around it; the model takes {limit}, "
            f"of which {room} are left to the answer"
        )

    def _answer(self, ids: Sequence[int]) -> Iterator[TextPiece]:
        limit, text = self.model.cfg.max_positions or NO_LIMIT, ""
        most = min(self.sampling.max_tokens, limit - len(ids))
        sampling = replace(self.sampling, max_tokens=most, seed=self.sampling.seed + self.answers)
        self.answers += 1
        try:
            for piece in stream(self.model, self.tokenizer, [ids], sampling):
                text += piece.text
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": text})
