"""`castalia start`: from a folder of text to a trained model."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.cli.render import print_facts

if TYPE_CHECKING:
    from castalia.config.commented import Settings
    from castalia.config.schema import RunConfig
    from castalia.quickstart.choose import Choice, Pace
    from castalia.quickstart.corpus import Corpus
    from castalia.quickstart.look import Folder

PLAN, CONFIG = "start.json", "start.yml"  # in the run's folder: what was asked and chosen; the config that trains
HOURS = 1.0


def command(
    folder: Annotated[Path, typer.Argument(help="a folder with txt, md, html, jsonl or parquet files; or one file")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="any setting instead of the chosen one")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help=f"time for everything  [default: {HOURS:g}]")] = None,
    size: Annotated[str | None, typer.Option(help="instead: parameters, such as 5M; the time is said")] = None,
    output: Annotated[
        Path | None, typer.Option(help="the run's folder  [default: runs/ and the folder's name]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="look, measure and say the plan; write nothing")] = False,
) -> None:
    """Train a model on a folder of text, in the time that you have.

    \b
    Examples:
      castalia start notes --hours 9
      castalia start notes --hours 9 --dry-run

    Looks at the text, measures this machine, chooses model and training for the time and says why, learns a
    vocabulary, trains, judges the model by text that it never saw, and reports. Stopped and started again with
    the same command it continues.
    """
    begin = time.monotonic()  # looking and preparing count towards the hours
    parameters = _parameters(size, hours)
    wanted = None if parameters else hours or HOURS
    _check_words(words or [])
    run = output or Path("runs") / (folder.resolve().stem or "text")
    # Compared when the command is given again, perhaps from elsewhere: hence the whole path.
    asked = {"folder": str(folder.resolve()), "hours": wanted, "size": parameters, "words": words or []}
    if not dry_run:
        _refuse_another(run, asked)
    if not dry_run and (run / CONFIG).is_file():  # written last, when all that it names is there
        print(f"continuing {run}, which this command began")
    else:
        _prepare(folder, run, asked, begin, dry_run)
    if not dry_run:
        _train(run)
        _finish(run)


def _check_words(words: list[str]) -> None:
    """Raises ConfigError for settings that there are none of, before anything long begins."""
    from castalia.config.load import load_config
    from castalia.quickstart.family import architecture

    model = architecture(2, 64, 512, 256)  # any will do: only the words are checked
    del model["max_positions"]
    load_config([{"model": model}], words, any_batch=True)


def _parameters(size: str | None, hours: float | None) -> float | None:
    """`5M` as a number."""
    from castalia.errors import ConfigError

    if size is None:
        return None
    if hours is not None:
        raise ConfigError("--hours and --size exclude each other: the one follows from the other")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", size)
    if not match or not float(match[1]):
        raise ConfigError(f"--size {size}: give a number of parameters such as 800k, 5M or 1.2B")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]


def _refuse_another(run: Path, asked: dict[str, Any]) -> None:
    """Only what this very command began may be in the folder."""
    from castalia.errors import TrainingError
    from castalia.reading import read_json
    from castalia.train.run_folder import refuse_second_start

    if not (run / PLAN).is_file():
        refuse_second_start(run)
        return
    before = read_json(run / PLAN, TrainingError)["asked"]
    if before != asked:
        changed = ", ".join(
            f"{name} {before.get(name)} -> {asked[name]}" for name in asked if before.get(name) != asked[name]
        )
        raise TrainingError(
            f"{run} was begun by another command ({changed}); continue it: castalia train {run}; "
            f"or begin another one: --output {run}-2"
        )


def _prepare(folder: Path, run: Path, asked: dict[str, Any], begin: float, dry_run: bool) -> None:
    """Looks, chooses and says so; then writes tokenizer, corpus and config, unless it is a dry run."""
    from castalia.errors import TrainingError
    from castalia.quickstart.choose import Choice
    from castalia.quickstart.explain import about_choice, about_loss, about_text, reasons
    from castalia.quickstart.look import look
    from castalia.reading import read_json
    from castalia.report.run_report import REASONS

    _say("looking", f"at {folder}")
    seen = look(folder, not_inside=run)  # the run may lie in the folder that it reads
    print_facts(about_text(seen))
    if (run / PLAN).is_file() and not dry_run:
        print("continuing with the plan that this command made before")
        chosen = Choice(**read_json(run / PLAN, TrainingError)["choice"])
    else:
        chosen, twice, machine, pace = _choose(seen, asked)
        print_facts([*about_choice(chosen, machine), *about_loss(chosen, twice, seen)])
        if asked["words"]:
            _say("as you asked", f"{' '.join(asked['words'])}, which the plan above does not know of")
        if dry_run:
            print("dry run: nothing was written; without --dry-run the run begins")
            return
        run.mkdir(parents=True, exist_ok=True)
        _write_json(run / REASONS, reasons(chosen))
        _write_json(run / PLAN, {"asked": asked, "pace": pace, "choice": asdict(chosen), "text": _facts(seen)})
    _write_config(seen, chosen, run, asked, begin)


def _choose(seen: Folder, asked: dict[str, Any]) -> tuple[Choice, Choice | None, str, Pace]:
    """The choice, the one for twice the time, the machine in words, and its pace."""
    from castalia.quickstart.choose import TRAINING_SHARE, choose
    from castalia.quickstart.measure import measure_pace
    from castalia.train.hardware import choose_device, choose_dtype, device_and_memory, machine_name, name_of

    _say("measuring", "this machine with two small models, for some seconds")
    device, memory = device_and_memory()
    pace = measure_pace(device)
    precision = name_of(choose_dtype("auto", choose_device("auto")))
    seconds = asked["hours"] * 3600 * TRAINING_SHARE if asked["hours"] else None

    def chosen(factor: int) -> Choice:
        return choose(
            seen.bytes, pace, memory,
            seconds=seconds and seconds * factor, size=asked["size"], xz_bits_per_byte=seen.xz_bits_per_byte,
            device=device, precision=precision,
        )  # fmt: skip

    return chosen(1), chosen(2) if seconds else None, machine_name(choose_device("auto")), pace


def _write_config(seen: Folder, choice: Choice, run: Path, asked: dict[str, Any], begin: float) -> None:
    """Writes tokenizer, corpus and `start.yml`."""
    from castalia.config.commented import commented, load, overridden
    from castalia.errors import TrainingError
    from castalia.files import write_text
    from castalia.quickstart.choose import MAX_PASSES
    from castalia.quickstart.corpus import prepare_corpus
    from castalia.reading import read_json

    corpus = prepare_corpus(seen, choice.vocab_size, run / "data", lambda text: _say("preparing", text))
    _say("corpus", f"{corpus.train_tokens:,} tokens to learn from, {corpus.valid_tokens:,} held out, by a hash of them")
    if corpus.bad:
        _say("passed over", f"{len(corpus.bad):,} of the records, no text: {corpus.bad[0]}")
    _say("measuring", "this very model on this text, for some seconds")
    choice, values = _fit(choice, corpus, seen, run, asked, begin)
    config = load(values, asked["words"])
    plan = read_json(run / PLAN, TrainingError)
    _write_json(run / PLAN, plan | {"choice": asdict(choice)})  # as fitted: `_finish` compares with what it expects
    command_line = " ".join(shlex.quote(word) for word in ["castalia", *sys.argv[1:]])
    head = [
        f"Written by `{command_line}`, {time.strftime('%Y-%m-%d')}.",
        "Each line says why. Change what you like and train again, into another folder:",
        f"  castalia train {run / CONFIG} checkpoint.dir={run}-2",
        "What a key means, and all others: castalia config explain KEY",
        "",
    ]
    write_text(run / CONFIG, commented(overridden(values, config), head))
    print(f"wrote {run / CONFIG}, to read, to change and to run again")
    steps = config.train.steps or 0
    passes = config.train.epochs or steps * _tokens_of_step(config) / corpus.train_tokens
    seconds = _tokens_of_step(config) / choice.tokens_per_second
    length = f"{steps:,} steps" if steps else f"{config.train.epochs} epochs"
    _say("training", f"{length} of {seconds:.2g} s a step, {passes:.2g} passes over the text")
    _say("expect", f"{choice.bits_per_byte:.2f} bits for each byte of text that it never saw")
    if passes > MAX_PASSES + 1:
        print(f"WARNING: {passes:.0f} PASSES OVER THE TEXT: after {MAX_PASSES} a model learns it by heart")


def _fit(
    choice: Choice, corpus: Corpus, seen: Folder, run: Path, asked: dict[str, Any], begin: float
) -> tuple[Choice, Settings]:
    """The choice and its settings for as many steps as fit into the time that is left, at the model's own speed."""
    from castalia.config.commented import load
    from castalia.quickstart.choose import LEAST_STEPS, MAX_PASSES, TRAINING_SHARE, fitted_to
    from castalia.quickstart.config_text import Places, settings
    from castalia.quickstart.measure import seconds_per_step

    places = Places(str(run.resolve()), *(os.path.abspath(path) for path in corpus[:3]))
    trial = load(settings(choice, places, corpus.valid_tokens, choice.steps, 1.0), asked["words"])
    speed = _tokens_of_step(trial) / seconds_per_step(trial, 5.0)
    tokens, left = choice.tokens, 0.0
    if asked["hours"]:
        seconds = asked["hours"] * 3600
        left = max(seconds - (time.monotonic() - begin), seconds / 2)  # a slow preparation is not to leave nothing
        tokens = math.floor(TRAINING_SHARE * left * speed)
    tokens = min(tokens, MAX_PASSES * corpus.train_tokens)
    choice = fitted_to(choice, tokens, speed, corpus.train_tokens, corpus.bytes, seen.xz_bits_per_byte)
    # The batch has followed the number of tokens, unless the user's words set it.
    per_step = _tokens_of_step(load(settings(choice, places, corpus.valid_tokens, 1, 1.0), asked["words"]))
    steps = max(LEAST_STEPS, tokens // per_step)
    values = settings(choice, places, corpus.valid_tokens, steps, per_step / speed)
    if left:
        reason = "hours: saves and stops then, should the machine become slower"
        values["train.max_hours"] = (round(left / 3600, 4), reason)
    return choice, values


def _tokens_of_step(config: RunConfig) -> int:
    assert config.train.batch_size is not None
    return config.train.batch_size * config.data.seq_length


def _train(run: Path) -> None:
    from castalia.cli.train import train
    from castalia.config.load import load_config, load_run
    from castalia.train.run_folder import is_run

    train(load_run(run) if is_run(run) else load_config(run / CONFIG))


def _finish(run: Path) -> None:
    """Judges the model by the held-out text and writes the report."""
    from castalia.config.load import load_run
    from castalia.errors import TrainingError
    from castalia.reading import read_json
    from castalia.report.report_text import lines
    from castalia.report.run_report import write_report

    report = write_report(run, run / "report.html", say=lambda line: _say("report", line))
    print()
    for line in lines(report, sys.stdout.isatty()):
        print(line)
    expected = read_json(run / PLAN, TrainingError)["choice"]["bits_per_byte"]
    bits, steps = report.score.bits_per_byte, load_run(run).train.steps or 0
    print(f"\n{bits:.3f} bits per byte where {expected:.2f} were expected" if bits else "")
    if report.step < steps:
        print(f"after {report.step:,} of {steps:,} steps; the same command continues with the others")
    print(f"wrote {run / 'report.html'}, a page to open in a browser or to send to a friend")


def _facts(seen: Folder) -> dict[str, Any]:
    return {
        "bytes": seen.bytes,
        "documents": seen.documents,
        "kinds": dict(seen.kinds),
        "left_out": dict(seen.left_out),
        "xz_bits_per_byte": seen.xz_bits_per_byte,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    from castalia.files import write_text

    write_text(path, json.dumps(value, indent=1) + "\n")


def _say(name: str, text: str) -> None:
    print_facts([(name, text)])
