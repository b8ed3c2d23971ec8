"""`castalia chat`: talk with a model in the terminal, by its chat template."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from castalia.cli.streaming import MemoryOption

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.generate.dialogue import Dialogue
    from castalia.generate.generation import TextPiece

HELP = """\
/reset          forget what was said
/system TEXT    begin anew with this system message; without TEXT with none
/regenerate     another answer to the last question
/save FILE      write the conversation to a file, as finetune and eval read it
/exit           end (Ctrl-D does, too); Ctrl-C ends an answer
Anything else is a turn of yours; put a space before one that begins with a slash."""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="a run, or a checkpoint of any format")],
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    adapter: Annotated[str | None, typer.Option(help="adapters on MODEL, a folder that PEFT or TRL wrote")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, or folder with one; default: the model's")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: always the likeliest token; default: as generation_config.json says, else 0"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="only the k likeliest tokens; 0: all")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="only the likeliest tokens that hold this share; 0: all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random choices")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer; else max_new_tokens, or 512")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end answers before this string, too; may be repeated")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option(help="of weights and computation")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option()] = "auto",
    memory: MemoryOption = None,
) -> None:
    """Talk with a model: turns become text by its chat template, and answers end where the turn ends.

    \b
    Examples:
      castalia chat runs/chat
      castalia chat runs/chat --system "Answer in one word." --temperature 0.7

    Lines of standard input are the turns, typed or piped. /help lists the commands of a conversation.
    """
    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.cli.generate import check_stops, configured, open_writer, sampling_of
    from castalia.cli.streaming import memory_bytes
    from castalia.data.chat import chat_of
    from castalia.generate.dialogue import ANSWER_TOKENS, Dialogue
    from castalia.generate.generation import Sampling
    from castalia.streaming.streamed_model import streamed_stage

    check_stops(stop)
    checkpoint = open_with(model, adapter, step)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens}
    words = load_tokenizer_for(checkpoint, tokenizer)
    chat = chat_of(words, chat_template)
    chosen = {"max_tokens": ANSWER_TOKENS} | sampling_of(configured(checkpoint, None, given), words.folder)
    sampling = Sampling(**chosen, seed=seed, stop=tuple(stop or ()), batch_size=1)
    budget = memory_bytes(memory)
    writer, _ = open_writer(checkpoint, words, None, sampling, dtype, device, 1, 1, memory=budget)
    with closing(streamed) if (streamed := streamed_stage(writer)) else nullcontext():
        converse(Dialogue(writer, words, chat, sampling, system))


def open_with(model: str, adapter: str | None, step: int | None) -> Checkpoint:
    """The model, with the adapters of a folder of PEFT's if one is named. Raises ConfigError for another folder."""
    from castalia.checkpoint.opener import detect, find_folder
    from castalia.cli.opening import open_and_tell
    from castalia.errors import ConfigError

    if adapter is None:
        return open_and_tell(model, step=step)
    if detect(find_folder(adapter)) != "peft":
        raise ConfigError(f"--adapter {adapter} is not a PEFT folder; a run holds its model, so chat with it alone")
    return open_and_tell(adapter, base=str(find_folder(model, step)))


def converse(dialogue: Dialogue) -> None:
    """Answer line after line of standard input. A mistake ends the program unless somebody sits at the terminal."""
    from castalia.errors import CastaliaError

    typed = sys.stdin.isatty()
    if typed:
        print("/help lists the commands", file=sys.stderr)
    for line in lines(typed):
        try:
            if not respond(dialogue, line):
                return
        except (CastaliaError, OSError) as error:
            if not typed:
                raise
            print(f"error: {error}", file=sys.stderr)


def lines(typed: bool) -> Iterator[str]:
    """Lines that are not empty, until the input ends. At a terminal, Ctrl-C drops the line that is being typed."""
    if not typed:
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  `input` then edits lines and remembers them

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip():
            yield line


def respond(dialogue: Dialogue, line: str) -> bool:
    """What a line asks for. Returns False where it ends the conversation. Raises ConfigError for unknown commands."""
    from castalia.errors import ConfigError

    word, _, rest = line.partition(" ")
    if not line.startswith("/"):
        show(dialogue, dialogue.ask(line.strip()))
    elif word == "/reset":
        dialogue.reset()
    elif word == "/system":
        dialogue.instruct(rest.strip())
    elif word == "/regenerate":
        show(dialogue, dialogue.regenerate())
        if not dialogue.sampling.temperature:
            print("note: without --temperature an answer does not change", file=sys.stderr)
    elif word == "/save":
        save(dialogue, rest.strip())
    elif word == "/help":
        print(HELP)
    elif word in ("/exit", "/quit"):
        return False
    else:
        raise ConfigError(f"there is no command {word}; /help lists them, and a space before the slash makes it a turn")
    return True


def show(dialogue: Dialogue, pieces: Iterator[TextPiece]) -> None:
    """Print an answer as it is written, and what is not as one would expect."""
    if dialogue.left_out:
        turns = f"the oldest {dialogue.left_out} questions and answers are"
        print(
            f"note: {turns} no longer in the model's view of {dialogue.model.cfg.max_positions} tokens", file=sys.stderr
        )
    reason = None
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            reason = piece.finish_reason
    except KeyboardInterrupt:  # ends the answer, of which what is there stays
        if not sys.stdin.isatty():
            raise
        pieces.close()  # type: ignore[attr-defined]  # a generator
    print(flush=True)
    if reason == "length":
        print("note: the answer is cut: --max-tokens, or the model's positions", file=sys.stderr)


def save(dialogue: Dialogue, name: str) -> None:
    """Write the conversation, as a line of chat data. Raises ConfigError without a name, and for a file that exists."""
    from castalia.errors import ConfigError
    from castalia.files import write_text

    if not name or Path(name).exists():
        raise ConfigError(f"{name} exists already; /save another FILE" if name else "/save needs the name of a FILE")
    write_text(name, json.dumps({"messages": dialogue.messages}, ensure_ascii=False) + "\n")
    print(f"{len(dialogue.messages)} messages saved in {name}", file=sys.stderr)
