"""`castalia generate`: text from a checkpoint of any format, shown while it is written."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.cli.streaming import MemoryOption
from castalia.strict_json import to_json

BATCH_SIZE = 16  # texts that are written at a time with a model in memory

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.config.schema import GenerateConfig
    from castalia.data.tokenizer import Tokenizer
    from castalia.data.tokenizer_folder import TokenizerFolder
    from castalia.generate.generation import AnyModel, Prompt, Sampling, TextPiece


def command(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run, or a checkpoint of any format")],
    prompt: Annotated[list[str] | None, typer.Option(help="may be repeated; without one: whole documents")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='a prompt on each line; in .jsonl a string, or an object with "prompt" or "text"'),
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="read prompts from the terminal")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="prompts are questions, put into the chat template; answers alone are shown")
    ] = False,
    system: Annotated[str | None, typer.Option(help="with --chat: the system message")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="with --chat: Jinja file, or folder with one; default: the model's")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0: always the likeliest token. What is given neither here nor in a config is as the model's "
            "generation_config.json says, which samples with do_sample alone; else 0",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="only the k likeliest tokens; 0: all")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="only the likeliest tokens that hold this share; 0: all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random choices")] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="of each text; default: max_new_tokens of the model's generation_config.json, 64, --chat: 512"
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="texts for each prompt; default: 1, or as the config says")
    ] = None,
    best_of: Annotated[
        int | None, typer.Option(min=2, help="write so many for each prompt and show the one that --judge likes best")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="with --best-of: a reward model of any format")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="end the text before this string, which may spell special tokens; may be repeated"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="texts that are written at a time; default: 16, with --memory what it holds"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        typer.Option(
            help="of weights and computation; int8: weights only, on CPUs, each row rounded to 255 steps: "
            "a quarter of fp32's memory and time, and texts that differ a little"
        ),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option()] = "auto",
    config: Annotated[
        str | None, typer.Option(help="a file with sampling settings, such as NeoX's text_generation.yml")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="split heads, MLP and vocabulary over so many processes")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="split the blocks over so many processes")] = 1,
    memory: MemoryOption = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="number of processes on this machine; default: tp * pp")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write prompts and texts to this file, one JSON a line")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line instead of text")] = False,
) -> None:
    """Write text with a checkpoint: after prompts, or whole documents without one.

    \b
    Examples:
      castalia generate runs/first --prompt "In the beginning" --max-tokens 20
      castalia generate runs/first --file prompts.txt --temperature 0.8 --top-p 0.95 --json
      castalia generate runs/chat --chat --prompt "which day?"
    """
    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.cli.opening import open_and_tell
    from castalia.cli.ranks import start_processes
    from castalia.cli.streaming import block_progress, memory_bytes
    from castalia.data.chat import chat_of
    from castalia.errors import ConfigError
    from castalia.generate.dialogue import ANSWER_TOKENS, opening, prompt_ids, turn_ends
    from castalia.generate.generation import Sampling
    from castalia.generate.prompts import prompts_of
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main
    from castalia.streaming.streamed_model import streamed_stage
    from castalia.train.hardware import choose_device

    if dtype == "int8" and (tp * pp > 1 or choose_device(device).type != "cpu"):
        raise ConfigError("--dtype int8 is for one process on a CPU; take bf16, or --device cpu without --tp and --pp")
    check_stops(stop)
    budget = memory_bytes(memory)
    world = start_processes(tp, pp, nproc)
    checkpoint = open_and_tell(path, step=step)
    given = {
        "mode": _mode(prompt, file, interactive),
        "input_file": str(file) if file else None,
        "output_file": str(output) if output else None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "num_samples": best_of or num_samples,
    }
    settings = configured(checkpoint, config, given)
    typed = settings.mode == "interactive"
    _check_chat(chat, bool(prompt) or settings.mode == "input-file", system, chat_template)
    if world > 1 and typed:
        raise ConfigError(f"{world} processes cannot all read the terminal; give --prompt or --file")
    prompts = [""] if typed else prompt or prompts_of(settings)  # typed ones come one by one
    _refuse_broken_text(prompts)
    batches = _typed(settings.prompt_end) if typed else [prompts]
    with process_group(choose_device(device).type):
        words = load_tokenizer_for(checkpoint, tokenizer)
        template = chat_of(words, chat_template) if chat else None
        sampling = Sampling(
            **({"max_tokens": ANSWER_TOKENS} if chat else {}) | sampling_of(settings, words.folder),
            num_samples=settings.num_samples,
            seed=seed,
            stop=(*(stop or ()), *(turn_ends(template, words) if template else ())),
        )
        _check_best(best_of, judge, num_samples, typed or world > 1, sampling.temperature)

        def asked(prompt: str) -> Prompt:
            """What the model is to continue: the prompt itself, or the conversation that it begins."""
            return prompt_ids(opening(prompt, system), template, words) if template else prompt

        def chosen(pieces: Iterator[TextPiece], prompts: list[str]) -> Iterator[TextPiece]:
            """Of several texts for each prompt the best one, where there is a judge."""
            return best_pieces(judge, pieces, prompts, system, chat) if judge else pieces

        known, texts = None if typed else [asked(prompt) for prompt in prompts], len(prompts) * settings.num_samples
        model, at_once = open_writer(
            checkpoint, words, known, sampling, dtype, device, texts, batch_size, memory=budget, tp=tp, pp=pp
        )
        sampling = replace(sampling, batch_size=at_once)
        with block_progress(streamed_stage(model), None if typed else -(-texts // at_once) * sampling.max_tokens):
            shown = settings.with_({"num_samples": 1}) if judge else settings
            _write_all(model, words, batches, asked, chosen, shown, sampling, as_json, not is_main(), echo=not chat)


def open_writer(
    checkpoint: Checkpoint,
    words: Tokenizer,
    prompts: Sequence[Prompt] | None,
    sampling: Sampling,
    dtype: str,
    device: str,
    texts: int,
    batch_size: int | None,
    *,
    memory: int | None,
    tp: int = 1,
    pp: int = 1,
) -> tuple[AnyModel, int]:
    """The model that writes, and how many of all `texts` it writes at a time. If it is streamed, that is told.

    `prompts`: None if they are not known yet. `batch_size`: the user's wish. See `streamed_writer`, `load_writer`.
    """
    from castalia.cli.streaming import tell_streaming
    from castalia.generate.writer import Numbers, load_writer, streamed_writer
    from castalia.train.hardware import choose_device, choose_dtype

    place = choose_device(device)
    # The checkpoint's very values on CPUs unless asked otherwise. int8 weights are made from bf16.
    wanted = {"int8": "bf16", "auto": "fp32" if place.type == "cpu" else "auto"}.get(dtype, dtype)
    numbers = Numbers(choose_dtype(wanted, place), place, dtype == "int8")
    sampling = replace(sampling, batch_size=batch_size or texts)
    if streamed := streamed_writer(checkpoint, words, prompts, sampling, numbers, memory, tp, pp):
        tell_streaming(streamed, "texts", "a token of each text", sampling.max_tokens)
        return streamed, streamed.calls_at_once
    at_once = batch_size or BATCH_SIZE
    return load_writer(checkpoint, numbers, min(texts, at_once), tp, pp), at_once


def _write_all(
    model: AnyModel,
    words: Tokenizer,
    batches: Iterable[list[str]],
    asked: Callable[[str], Prompt],
    chosen: Callable[[Iterator[TextPiece], list[str]], Iterator[TextPiece]],
    settings: GenerateConfig,
    sampling: Sampling,
    as_json: bool,
    quiet: bool,
    echo: bool,
) -> None:
    """Every process writes the same; all but one keep it to themselves. With `echo`, prompts stand before texts."""
    from castalia.generate.generation import stream

    with open(os.devnull if quiet else settings.output_file or os.devnull, "w", encoding="utf-8") as saved:
        for prompts in batches:
            _refuse_broken_text(prompts)
            pieces = stream(model, words, [asked(prompt) for prompt in prompts], sampling)
            if quiet:
                deque(pieces, maxlen=0)  # the model runs as the pieces are taken, and every rank has to run it
                continue
            pieces = chosen(pieces, prompts)
            for record in _show(pieces, prompts, settings, as_json, echo and settings.mode != "interactive"):
                print(record, file=saved, flush=True)


def _refuse_broken_text(prompts: list[str]) -> None:
    from castalia.errors import DataError

    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # Python keeps bytes that it cannot decode as lone surrogates
            raise DataError(f"prompt {number} is not UTF-8 at character {error.start}: {prompt!a}") from error


def _mode(prompt: list[str] | None, file: Path | None, interactive: bool) -> str | None:
    from castalia.errors import ConfigError

    asked = {"--prompt": prompt, "--file": file, "--interactive": interactive}
    names = [name for name, value in asked.items() if value]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} exclude each other; keep one")
    # GPT-NeoX's names. It has none for prompts on the command line, which go before those of a mode.
    modes = {"--prompt": "unconditional", "--file": "input-file", "--interactive": "interactive"}
    return modes[names[0]] if names else None


def check_stops(stops: Sequence[str] | None) -> None:
    """Raises ConfigError for an empty stop string."""
    from castalia.errors import ConfigError

    if "" in (stops or ()):
        raise ConfigError("--stop is empty, and would end every text before its first letter; leave it out")


def _check_chat(chat: bool, asks: bool, system: str | None, template: Path | None) -> None:
    from castalia.errors import ConfigError

    options = {"--system": system, "--chat-template": template}
    if given := [name for name, value in options.items() if value is not None and not chat]:
        raise ConfigError(f"{' and '.join(given)} need --chat")
    if chat and not asks:
        raise ConfigError("--chat needs questions: --prompt or --file; to talk with the model: castalia chat")


def _check_best(best_of: int | None, judge: str | None, num_samples: int | None, many: bool, heat: float) -> None:
    from castalia.errors import ConfigError

    if (best_of is None) != (judge is None):
        raise ConfigError("--best-of N and --judge REWARD go together: the reward model chooses one of N texts")
    if best_of is None:
        return
    if num_samples or many:
        raise ConfigError("--best-of excludes --num-samples, --interactive and several processes")
    if not heat:
        raise ConfigError("--best-of chooses among texts that differ: give a --temperature above 0, such as 0.8")


def best_pieces(
    judge: str, pieces: Iterator[TextPiece], prompts: list[str], system: str | None, chat: bool
) -> Iterator[TextPiece]:
    """The text of each prompt that the judge gives the highest reward, in one piece, once all are written."""
    from castalia.cli.score import best_texts

    texts: dict[int, str] = {}
    reasons: dict[int, TextPiece] = {}
    for piece in pieces:
        texts[piece.row] = texts.get(piece.row, "") + piece.text
        reasons[piece.row] = piece
    written = [texts[row] for row in sorted(texts)]
    for number, (row, _) in enumerate(best_texts(judge, prompts, written, system, chat)):
        yield reasons[row]._replace(row=number, text=texts[row])


def configured(checkpoint: Checkpoint, overlay: str | None, given: dict[str, Any]) -> GenerateConfig:
    """The command line over the overlay over the checkpoint's own config."""
    from castalia.cli.config import print_notes
    from castalia.config.load import load_config
    from castalia.config.schema import RunConfig

    base = checkpoint.config or RunConfig()
    if overlay:
        base = load_config([base, overlay])
        print_notes(base)
    return base.generate.with_({name: value for name, value in given.items() if value is not None})


def sampling_of(settings: GenerateConfig, words: TokenizerFolder) -> dict[str, Any]:
    """What is set, else what the model's files say, which is told, else nothing."""
    from pydantic import ValidationError

    from castalia.cli.opening import tell
    from castalia.config.schema import GenerateConfig
    from castalia.data.tokenizer_folder import GENERATION, SAMPLED, SAMPLING
    from castalia.errors import DataError

    given = {name: value for name in SAMPLING.values() if (value := getattr(settings, name)) is not None}
    found, idle = words.sampling()
    taken = {name: value for name, value in found.items() if name not in given}
    place = str(words.places.get(GENERATION))
    try:
        GenerateConfig.model_validate(taken, strict=True)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise DataError(
            f"{place}: {name} is {taken[name]!r}: {error.errors()[0]['msg']}; correct it, or give "
            f"--{name.replace('_', '-')}"
        ) from error
    parts = [f"{', '.join(f'{name} {value}' for name, value in taken.items())}"] if taken else []
    if idle:
        greedy = " (without do_sample: the likeliest token)" if idle.keys() & SAMPLED.keys() else ""
        parts.append(f"of no effect here: {', '.join(f'{name} {value}' for name, value in idle.items())}{greedy}")
    tell([f"sampling as it says: {'; '.join(parts)}"] if parts else [], place)
    return taken | given


def _typed(end: str) -> Iterator[list[str]]:
    """Prompts from standard input, one at a time, each ended by `end`, until it closes."""
    text = ""
    while True:
        if not text and sys.stdin.isatty():  # not in the middle of a prompt of several lines
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        text += line
        if text.endswith(end) or not line:
            if text.strip():
                yield [text.removesuffix(end)]
            text = ""
        if not line:
            return


def _show(
    pieces: Iterator[TextPiece], prompts: Sequence[str], settings: GenerateConfig, as_json: bool, echo: bool
) -> Iterator[str]:
    """Print each text after its prompt, in order and as it is written. Yields a JSON object for each finished one."""
    from castalia.generate.generation import in_order

    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    row, text = -1, ""
    for piece in in_order(pieces):
        prompt = prompts[piece.row // settings.num_samples]
        if piece.row != row:
            row, text = piece.row, ""
            if not as_json:
                print(("\n" if row else "") + (bold + prompt + plain if echo else ""), end="")
        text += piece.text
        if not as_json:
            print(piece.text, end="\n" if piece.last else "", flush=True)
        if piece.last:
            record = {"prompt": prompt, "text": text, "finish_reason": piece.finish_reason}
            if as_json:
                # A terminal that is not UTF-8 gets escapes, which JSON allows; the file is UTF-8.
                print(to_json(record, ensure_ascii=(sys.stdout.encoding or "utf-8").lower() != "utf-8"), flush=True)
            yield to_json(record, ensure_ascii=False)
