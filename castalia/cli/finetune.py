"""`castalia finetune`: a model taught by a file of texts, conversations or preferences, and what that changed."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.cli.train import RESTARTS, Verbose
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.finetuning.before_after import Look
    from castalia.finetuning.finetune_run import Request


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a run, or a checkpoint of any format")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE... [CONFIG...] [KEY=VALUE...]", help="jsonl, json, parquet, txt; then settings"),
    ] = None,
    objective: Annotated[
        Literal["causal", "dpo", "kto", "orpo", "reward"] | None,
        typer.Option(help="what to make of preferences; texts and conversations need none"),
    ] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="rank of the adapters  [default: 16]")] = None,
    full: Annotated[bool, typer.Option("--full", help="train all weights instead of adapters")] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, or folder with one; default: the model's, else `role: content`")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out records that cannot be read")] = False,
    prompt: Annotated[str | None, typer.Option(help="of the sample; default: those of held-out records")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of a sample")] = 40,
    nproc: Annotated[int | None, typer.Option(min=1, help="number of processes on this machine")] = None,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object at the end, all else on standard error")] = False,
) -> None:
    """Fine-tune a model on texts or conversations, or by preferences.

    \b
    Examples:
      castalia finetune runs/first chats.jsonl train.steps=5 checkpoint.dir=runs/tuned
      castalia finetune runs/first texts.jsonl train.steps=5 checkpoint.dir=runs/full --full

    Records are {"text": ...}, messages of OpenAI or ShareGPT, Alpaca's fields, TRL's prompt and completion, or with
    --objective pairs (prompt, chosen, rejected) and judged answers (prompt, completion, label). A twentieth is held out
    and judges the model. Settings are chosen with reasons, and any of them may be given otherwise. If it is stopped,
    the same command continues it.
    """
    request = parsed(model, words or [], objective, lora, full, chat_template, skip_bad)
    request = replace(request, processes=nproc or 1)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        folder = teach(request, verbose)
        looks = show_changes(model, folder, prompt, max_tokens)
    if as_json:
        by_model = {name: {"scores": look.scores, "texts": look.texts} for name, look in looks.items()}
        print(to_json({"run": str(folder), "models": by_model}))


def teach(request: Request, verbose: bool) -> Path:
    """Chooses, prepares and trains. Returns the run's folder."""
    from castalia.cli.render import print_facts
    from castalia.cli.train import train
    from castalia.finetuning.finetune_run import CONFIG, begin

    config = begin(request, lambda name, text: print_facts([(name, text)]))
    folder = Path(str(config.checkpoint.dir))
    if request.processes > 1:
        from castalia.parallel.launcher import run_processes
        from castalia.train.run_folder import is_run
        from castalia.train.start_checks import find_obstacles, refuse

        refuse(find_obstacles(config, request.processes))
        words = ["train", str(folder if is_run(folder) else folder / CONFIG), *(["--verbose"] if verbose else [])]
        if code := run_processes(request.processes, words, RESTARTS):
            sys.exit(code)
    else:
        train(config, verbose)
    return folder


def parsed(
    model: str, words: list[str], objective: Any, lora: int | None, full: bool, template: Path | None, skip_bad: bool
) -> Request:
    """The words of the command as a request. Raises ConfigError for what excludes each other or is misplaced."""
    from castalia.cli.train import split_words
    from castalia.errors import ConfigError
    from castalia.finetuning.finetune_run import Request
    from castalia.finetuning.lessons import looks_like_data

    if full and lora:
        raise ConfigError("--full and --lora exclude each other; keep one")
    if looks_like_data(model):
        raise ConfigError(f"{model} holds data; the model comes first: castalia finetune MODEL {model}")
    files, settings = split_words(words)
    data = [file for file in files if looks_like_data(file) or Path(f"{file}.idx").is_file()]
    named = [word for word in settings if word.startswith("data.train=")]
    if data and named:
        raise ConfigError(f"{', '.join(data)} and {named[0]} both name what is learned; keep one")
    configs = [file for file in files if file not in data]
    return Request(model, tuple(data), tuple(configs), tuple(settings), lora or 16, full, objective, template, skip_bad)


def show_changes(model: str, folder: Path, prompt: str | None, max_tokens: int) -> dict[str, Look]:
    """Prints the figures and samples of the models before and after, and writes adapters in PEFT's layout.

    Returns them by the names of the models.
    """
    from castalia.cli.render import print_facts, print_table
    from castalia.config.load import load_run
    from castalia.data.tokenizer import decode_with_special
    from castalia.errors import CheckpointError
    from castalia.finetuning.before_after import compare, plan_adapters

    config = load_run(folder)
    looks, shown, tokenizer = compare(model, folder, config, prompt, max_tokens)
    names = list(dict.fromkeys(name for look in looks.values() for name in look.scores))
    if names:
        cells = {n: [f"{look.scores[n]:.4f}" if n in look.scores else "-" for look in looks.values()] for n in names}
        on = "answers" if config.train.objective == "causal" else "preferences"
        print()
        print_table(f"on held-out {on}", ("", *looks), [(name, *row) for name, row in cells.items()])
    for number, example in enumerate(shown):
        print()
        rows = [("prompt", decode_with_special(tokenizer, example.prompt).strip())]
        rows += [("in the data", tokenizer.decode(example.answer).strip())] if example.answer else []
        print_facts([*rows, *((name, look.texts[number].strip()) for name, look in looks.items() if look.texts)])
    best = next((name for name in looks if name.startswith("best")), None)
    if config.finetune.lora:
        try:
            write = plan_adapters(folder)
        except CheckpointError as error:
            print(f"note: the adapters are not written in PEFT's layout: {error}")
        else:
            print(f"\nadapters{' of the best state' if best else ''} in PEFT's layout: {write()}")
    if best:
        print(f"\nthe best state is in {folder / 'checkpoints' / 'best'}, the last one is what {folder} opens as")
    state_folder = folder / "checkpoints" / "best" if best else folder
    if config.train.objective == "reward":
        print(f"\njudge with it: castalia score {state_folder} --file FILE --output scores.jsonl")
    else:
        print(f"\ntalk with it: castalia chat {state_folder}")
    return looks
