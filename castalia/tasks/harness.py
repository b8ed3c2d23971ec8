"""The model that lm-eval asks for log-probabilities and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from castalia.data.chat import Chat, renderer
from castalia.data.tokenizer import Tokenizer
from castalia.errors import DataError
from castalia.evaluate.continuations import Continuation, ContinuationScore, scores_as_they_come
from castalia.evaluate.stream_measure import Watch, unwatched
from castalia.generate.generation import AnyModel, Sampling, TextPiece, stream
from castalia.streaming.streamed_model import StreamedTransformer, streamed_stage

DEFAULT_LENGTH = 2048  # of models without a largest position, as in lm-eval's own model of transformers
DEFAULT_NEW_TOKENS = 256  # of texts whose task does not limit them, likewise
ANSWERS_A_ROUND = 256  # of each process, before all get them
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
TAKEN = {*LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p"}


class Interrupted(Exception):
    """The caller asked to stop between two answers or, with several processes, between two rounds of them."""


class TaskModel(TemplateLM):
    """A model and its tokenizer, as lm-eval asks them. Rules are those of lm-eval's own model of transformers.

    With several processes, all of them get all requests and have all results: each computes its share of the requests,
    or its part of a model that is split over them.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: Tokenizer,
        *,
        length: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        shared: bool = False,
        watch: Watch = unwatched,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`length`: tokens that the model sees at most. `batch_size`: texts that are written at a time.

        `shared`: other processes have the same model, and take a share of the requests. `watch` shows the progress of
        the answers that it is given and hands on; `should_stop` is asked between them, and ends all processes with
        Interrupted. Raises DataError for a model and a tokenizer that do not belong
        together, or cannot be asked.
        """
        super().__init__()
        rows = model.cfg.padded_vocab_size
        if model.cfg.reward_head:
            raise DataError("tasks ask which tokens follow, and this reward model predicts none; see castalia score")
        if tokenizer.vocab_size > rows:
            last = tokenizer.vocab_size - 1
            raise DataError(
                f"the tokenizer has ids up to {last} ({tokenizer.token(last)!r}), but the model has {rows} rows of the "
                "vocabulary; it belongs to another model"
            )
        if tokenizer.eod_id is None and tokenizer.bos_id is None:
            raise DataError("tasks need a tokenizer with a token that begins or ends texts; this one has neither")
        self.model, self.words, self.watch, self.should_stop = model, tokenizer, watch, should_stop
        self.max_length = length or model.cfg.max_positions or DEFAULT_LENGTH
        self.batch_size, self.seed, self.shared = batch_size, seed, shared

    @property
    def streamed(self) -> StreamedTransformer | None:
        """The model, or this process's share of it, if it is read from disk block by block."""
        return streamed_stage(self.model)

    def close(self) -> None:
        """Let go of what a streamed model reads."""
        if self.streamed:
            self.streamed.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.prefix_token_id if self.words.eod_id is None else self.words.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The token before texts that have no context."""
        begin = self.words.eod_id if self.words.bos_id is None else self.words.bos_id
        assert begin is not None
        return begin

    @property
    def tokenizer_name(self) -> str:
        """Tells chat templates apart in lm-eval's cache of requests."""
        return f"castalia-{hash((self.words.kind, self.words.vocab_size, self.words.folder.template)):x}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with what the tokenizer adds to a text unless that is there already or not wanted."""
        if add_special_tokens is None:
            begin = self.words.token(self.prefix_token_id)
            add_special_tokens = not (begin and string.startswith(begin))
        return self.words.encode_batch([string], bare=not add_special_tokens)[0]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Scores of (strings, context ids, continuation ids). A continuation without tokens is certain."""
        asked = [number for number, (_, _, tokens) in enumerate(requests) if len(tokens)]
        results = [(0.0, True)] * len(requests)
        for number, score in self._scores([Continuation(*requests[number][1:]) for number in asked]):
            strings = requests[asked[number]][0]
            results[asked[number]] = score.log_prob, score.greedy
            if strings is not None:  # parts of a longer text have none
                self.cache_hook.add_partial("loglikelihood", strings, results[asked[number]])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-probabilities of whole texts, in windows of the model's length of which each predicts what is new."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[-1])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(Continuation(*make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in self._scores(windows):
            totals[owners[number]] += score.log_prob
        # Since 0.5, requests are pairs of an empty context and a text, and results are pairs, too.
        return [(t, False) if len(request.args) == 2 else t for t, request in zip(totals, requests, strict=True)]

    def _scores(self, requests: Sequence[Continuation]) -> Iterator[tuple[int, ContinuationScore]]:
        """The number and the score of each request."""
        mine = self._share(sorted(range(len(requests)), key=lambda number: (*requests[number].context,)))
        scores = scores_as_they_come(self.model, [requests[number] for number in mine], self.max_length)
        numbered = ((mine[number], score) for number, score in self.watch(scores, lambda score: 1, len(mine)))
        return self._of_all(numbered, len(requests))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of the strings that end it."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            sampling, options = self._sampling(requests[numbers[0]].args[1]), requests[numbers[0]].args[1]
            for number, text in self._texts([requests[n].args[0] for n in numbers], sampling):
                texts[numbers[number]] = text
                self.cache_hook.add_partial(
                    "generate_until", (requests[numbers[number]].args[0], options), texts[numbers[number]]
                )
        return texts

    def _texts(self, contexts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, str]]:
        room = self.max_length - sampling.max_tokens
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        mine = self._share(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        pieces = stream(self.model, self.words, [prompts[number] for number in mine], sampling, alone=True)
        numbered = self._whole_texts(self.watch(pieces, lambda piece: int(piece.last), len(mine)), mine)
        return self._of_all(numbered, len(prompts))

    @staticmethod
    def _whole_texts(pieces: Iterator[TextPiece], numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        texts: dict[int, str] = {}
        for piece in pieces:
            texts[piece.row] = texts.get(piece.row, "") + piece.text
            if piece.last:
                yield numbers[piece.row], texts.pop(piece.row)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Settings of a task. DataError for one that generation does not have, or for texts that leave no context."""
        unknown = {name: value for name, value in options.items() if name not in TAKEN}
        if unknown:
            raise DataError(
                f"generation_kwargs of a task: {', '.join(unknown)} has no counterpart here; "
                f"what acts is {', '.join(sorted(TAKEN))}"
            )
        given = next((int(options[name]) for name in LENGTH_NAMES if options.get(name) is not None), None)
        if given is not None and given >= self.max_length:
            raise DataError(
                f"a task asks for texts of {given} tokens, but the model sees {self.max_length}, context and text "
                "together; give a smaller max_gen_toks"
            )
        until = options.get("until") or []
        temperature = float(options.get("temperature") or 0.0)
        return Sampling(
            max_tokens=given or min(DEFAULT_NEW_TOKENS, self.max_length // 2),
            temperature=0.0 if options.get("do_sample") is False else temperature,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 0.0),
            seed=self.seed,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            batch_size=self.batch_size,
        )

    def _share(self, numbers: list[int]) -> list[int]:
        """The part of the requests that this process computes: neighbours, since they share the most."""
        if not self.shared:
            return numbers
        rank, world = dist.get_rank(), dist.get_world_size()
        return numbers[len(numbers) * rank // world : len(numbers) * (rank + 1) // world]

    def _of_all(self, own: Iterator[Any], total: int) -> Iterator[Any]:
        """The `total` results of all processes, as often as each has some more, so that they can be kept meanwhile."""
        if not self.shared:
            for answer in own:
                if self.should_stop():
                    raise Interrupted
                yield answer
            return
        world = dist.get_world_size()
        for _ in range(0, -(-total // world), ANSWERS_A_ROUND):  # as many rounds as the largest share takes
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, (list(islice(own, ANSWERS_A_ROUND)), self.should_stop()))
            if any(stop for _, stop in parts):  # whichever process was told, all end here
                raise Interrupted
            for answers, _ in parts:
                yield from answers

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the tokenizer, if conversations are wanted. DataError for one with another name."""
        if isinstance(chat_template, str) and chat_template:
            raise DataError(f"--apply_chat_template {chat_template}: templates have no names here; leave it out")
        return self.words.folder.template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, open for an answer or, after an answer's beginning, for the rest of that.

        Raises DataError where the tokenizer has no template, or where it refuses the conversation.
        """
        folder = self.words.folder
        if folder.template is None:
            raise DataError("the tokenizer has no chat template; run the tasks without one")
        render = renderer(Chat(folder.template, tuple(folder.special.items())))
        try:
            text = render(list(chat_history), add_generation_prompt).text
        except ValueError as error:
            raise DataError(f"the chat template refuses a task's conversation: {error}") from error
        if add_generation_prompt:
            return text
        final = chat_history[-1]["content"]
        return text[: text.rindex(final.strip()) + len(final.strip())]  # without the end of the turn
