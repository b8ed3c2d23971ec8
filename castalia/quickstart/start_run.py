"""`castalia start`: look, choose, prepare, train, judge. Stopped anywhere, it continues when called again."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from castalia.config.commented import Settings, commented, load, overridden
from castalia.config.load import load_config, load_run
from castalia.config.schema import RunConfig
from castalia.errors import TrainingError
from castalia.files import write_text
from castalia.quickstart.choose import LEAST_STEPS, MAX_PASSES, TRAINING_SHARE, Choice, Pace, choose, fitted_to
from castalia.quickstart.config_text import Places, settings
from castalia.quickstart.corpus import Corpus, prepare_corpus
from castalia.quickstart.explain import about_choice, about_loss, about_text, reasons
from castalia.quickstart.look import Folder, look
from castalia.quickstart.measure import measure_pace, seconds_per_step
from castalia.reading import read_json
from castalia.report.report_text import lines
from castalia.report.run_report import REASONS, Report, write_report
from castalia.train.hardware import choose_device, choose_dtype, device_and_memory, machine_name, name_of
from castalia.train.loop import train
from castalia.train.run_folder import is_run, refuse_second_start
from castalia.train.start_checks import find_obstacles, refuse
from castalia.wrapping import facts

PLAN, CONFIG = "start.json", "start.yml"  # in the run's folder: what was asked and chosen; the config that trains
Say = Callable[[str], object]  # is given each line for people


def start_run(
    folder: Path,
    run: Path,
    asked: dict[str, Any],
    begin: float,
    *,
    dry_run: bool,
    command: str,
    colored: bool,
    say: Say,
) -> dict[str, Any]:
    """Train a model on the text of a folder and report on it, into the folder `run`.

    Returns the plan (what was asked, seen, measured and chosen) and, unless it is a dry run, the report.

    `asked`: folder, hours or size, words (settings instead of the chosen ones); another call with the same continues.
    `begin`: when it was asked, by time.monotonic, as looking and preparing count. `command`: for the config's comment.

    Raises TrainingError where `run` was begun with something else asked, and other CastaliaErrors.
    """
    if not dry_run:
        _refuse_another(run, asked)
    if not dry_run and (run / CONFIG).is_file():  # written last, when all that it names is there
        say(f"continuing {run}, which this command began")
    else:
        plan = _prepare(folder, run, asked, begin, dry_run, command, say)
    if dry_run:
        return {"plan": plan}
    _train(run)
    report = _finish(run, colored, say)
    return {"run": str(run), "plan": read_json(run / PLAN, TrainingError), "report": report.as_json()}


def _refuse_another(run: Path, asked: dict[str, Any]) -> None:
    """Only what this very command began may be in the folder."""
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


def _prepare(
    folder: Path, run: Path, asked: dict[str, Any], begin: float, dry_run: bool, command: str, say: Say
) -> dict[str, Any]:
    """Looks, chooses and says so; then writes tokenizer, corpus and config, unless it is a dry run. The plan."""
    _say_fact(say, "looking", f"at {folder}")
    seen = look(folder, not_inside=run)  # the run may lie in the folder that it reads
    _say_facts(say, about_text(seen))
    if (run / PLAN).is_file() and not dry_run:
        say("continuing with the plan that this command made before")
        plan = read_json(run / PLAN, TrainingError)
        chosen = Choice(**plan["choice"])
    else:
        chosen, twice, machine, pace = _choose(seen, asked, say)
        plan = {"asked": asked, "pace": pace, "choice": asdict(chosen), "text": _facts(seen)}
        _say_facts(say, [*about_choice(chosen, machine), *about_loss(chosen, twice, seen)])
        if asked["words"]:
            _say_fact(say, "as you asked", f"{' '.join(asked['words'])}, which the plan above does not know of")
        if dry_run:
            say("dry run: nothing was written; without --dry-run the run begins")
            return plan | {"twice_the_time": twice and asdict(twice)}
        run.mkdir(parents=True, exist_ok=True)
        _write_json(run / REASONS, reasons(chosen))
        _write_json(run / PLAN, plan)
    _write_config(seen, chosen, run, asked, begin, command, say)
    return plan


def _choose(seen: Folder, asked: dict[str, Any], say: Say) -> tuple[Choice, Choice | None, str, Pace]:
    """The choice, the one for twice the time, the machine in words, and its pace."""
    _say_fact(say, "measuring", "this machine with two small models, for some seconds")
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


def _write_config(
    seen: Folder, choice: Choice, run: Path, asked: dict[str, Any], begin: float, command: str, say: Say
) -> None:
    """Writes tokenizer, corpus and `start.yml`."""
    corpus = prepare_corpus(seen, choice.vocab_size, run / "data", lambda text: _say_fact(say, "preparing", text))
    _say_fact(
        say,
        "corpus",
        f"{corpus.train_tokens:,} tokens to learn from, {corpus.valid_tokens:,} held out, by a hash of them",
    )
    if corpus.bad:
        _say_fact(say, "passed over", f"{len(corpus.bad):,} of the records, no text: {corpus.bad[0]}")
    _say_fact(say, "measuring", "this very model on this text, for some seconds")
    choice, values = _fit(choice, corpus, seen, run, asked, begin)
    config = load(values, asked["words"])
    plan = read_json(run / PLAN, TrainingError)
    _write_json(run / PLAN, plan | {"choice": asdict(choice)})  # as fitted: `_finish` compares with what it expects
    head = [
        f"Written by `{command}`, {time.strftime('%Y-%m-%d')}.",
        "Each line says why. Change what you like and train again, into another folder:",
        f"  castalia train {run / CONFIG} checkpoint.dir={run}-2",
        "What a key means, and all others: castalia config explain KEY",
        "",
    ]
    write_text(run / CONFIG, commented(overridden(values, config), head))
    say(f"wrote {run / CONFIG}, to read, to change and to run again")
    steps = config.train.steps or 0
    passes = config.train.epochs or steps * _tokens_of_step(config) / corpus.train_tokens
    seconds = _tokens_of_step(config) / choice.tokens_per_second
    length = f"{steps:,} steps" if steps else f"{config.train.epochs} epochs"
    _say_fact(say, "training", f"{length} of {seconds:.2g} s a step, {passes:.2g} passes over the text")
    _say_fact(say, "expect", f"{choice.bits_per_byte:.2f} bits for each byte of text that it never saw")
    if passes > MAX_PASSES + 1:
        say(f"WARNING: {passes:.0f} PASSES OVER THE TEXT: after {MAX_PASSES} a model learns it by heart")


def _fit(
    choice: Choice, corpus: Corpus, seen: Folder, run: Path, asked: dict[str, Any], begin: float
) -> tuple[Choice, Settings]:
    """The choice and its settings for as many steps as fit into the time that is left, at the model's own speed."""
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
    config = load_run(run) if is_run(run) else load_config(run / CONFIG)
    refuse(find_obstacles(config))
    train(config)


def _finish(run: Path, colored: bool, say: Say) -> Report:
    """Judges the model by the held-out text and writes the report."""
    report = write_report(run, run / "report.html", say=lambda line: _say_fact(say, "report", line))
    say("")
    for line in lines(report, colored):
        say(line)
    expected = read_json(run / PLAN, TrainingError)["choice"]["bits_per_byte"]
    bits, steps = report.score.bits_per_byte, load_run(run).train.steps or 0
    say(f"\n{bits:.3f} bits per byte where {expected:.2f} were expected" if bits else "")
    if report.step < steps:
        say(f"after {report.step:,} of {steps:,} steps; the same command continues with the others")
    say(f"wrote {run / 'report.html'}, a page to open in a browser or to send to a friend")
    return report


def _facts(seen: Folder) -> dict[str, Any]:
    return {
        "bytes": seen.bytes,
        "documents": seen.documents,
        "kinds": dict(seen.kinds),
        "left_out": dict(seen.left_out),
        "xz_bits_per_byte": seen.xz_bits_per_byte,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _say_facts(say: Say, rows: Sequence[tuple[str, str]]) -> None:
    for line in facts(rows):
        say(line)


def _say_fact(say: Say, name: str, text: str) -> None:
    _say_facts(say, [(name, text)])
