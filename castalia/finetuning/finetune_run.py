"""The order of a tuning: open the model, read the files, choose the settings, write the config; then it trains.

The run's folder keeps what was asked, so that the same command continues what it began.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.description import model_folder, tokenizer_settings
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import architecture, refuse_missing_tokenizer
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.commented import Settings, commented, nested, overridden
from castalia.config.fields import changed
from castalia.config.load import load_config, load_run
from castalia.config.objective import needs_reference
from castalia.config.schema import RunConfig, Source, Text
from castalia.config.setting import NEOX_DEFAULT
from castalia.data.indexed import open_dataset
from castalia.data.record_forms import Kind
from castalia.data.tokenizer import add_tokens, load_tokenizer
from castalia.data.tokenizer_folder import JINJA
from castalia.errors import ConfigError, DataError, TrainingError
from castalia.evaluate.log_probs import write_log_probabilities
from castalia.files import write_text
from castalia.finetuning.lessons import (
    Lesson,
    Lessons,
    Objective,
    Say,
    divide,
    kind_of_file,
    make_lesson,
    remember,
    remove,
    say_of_strings,
    template_for,
)
from castalia.finetuning.tuning_choice import choose, given, sizes_of
from castalia.loading import build_model
from castalia.reading import keys, read_json
from castalia.train.hardware import choose_device, choose_dtype, device_and_memory, name_of
from castalia.train.run_folder import is_run, refuse_second_start, run_folder

REMEMBERED = "data/lessons.json"  # in the run's folder: what was asked, and the corpora that were made for it
CONFIG = "finetune.yml"
SHAPE = keys({"asked": dict[str, Any], "kind": str | None, "train": list, "valid": list}, required=["asked"])
ROWS = 8  # documents at a time, for log-probabilities of the reference model
SETTLED = ("data.train=", "data.valid=", "train.epochs=", "tokenizer.")  # what the preparation has made something of
# The settings that are told, by what they are called there, and what stands between a value and its reason.
TOLD = {
    "data.seq_length": ("length", " "), "data.packing": ("packing", ": "), "train.batch_size": ("batch", " "),
    "train.micro_batch_size": ("micro-batch", " "), "train.steps": ("steps", " "), "optimizer.lr": ("rate", ": "),
    "eval.every": ("judged every", " "), "eval.patience": ("patience", " "),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a command asks for."""

    model: str
    files: tuple[str, ...] = ()  # of records; without them data.train names such or corpora
    configs: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # key=value
    rank: int = 16
    full: bool = False
    objective: Objective | None = None
    template: Path | None = None
    skip_bad: bool = False
    processes: int = 1  # that share a batch; another number continues the same run


def begin(request: Request, say: Say) -> RunConfig:
    """The config of the run that a request begins, with its data prepared; or of the one that it began before.

    Raises a CastaliaError for whatever cannot be tuned, before anything is written, and for a folder that holds another
    run.
    """
    source = open_checkpoint(request.model, adapters=True)
    if request.full and adapters_of(source):
        raise ConfigError(
            f"--full: {source.path} has adapters; merge them first: castalia merge-lora {request.model} OUT"
        )
    usual = usual_settings(request, source)
    # Loaded three times: to find folder and tokenizer, then with the corpora that are made with these, and at last
    # with the settings that are chosen by the corpora's sizes.
    config = with_tokenizer(load(usual, request), source)
    folder = run_folder(config)
    asked = asked_for(config, request)
    if is_run(folder):
        return continued(folder, asked, config)
    lessons = lessons_of(config, source, request, folder, asked, say)
    values = usual | data_settings(lessons) | tokenizer_settings_of(config, folder)
    if config.train.objective != "causal":
        values["data.packing"] = ("unpacked", "each answer is judged by itself")
    if config.train.objective == "reward":
        values["data.allow_chopped"] = (False, "a reward is read at the end of a text")
    # The final load leaves out the word `train.epochs=`, from which the number of steps is still to be chosen.
    epochs = config.train.epochs
    config = load(values, request, final=True).with_({"train.epochs": epochs})
    values |= fitting(config, source, lessons, request.processes)
    config = load(values, request, final=True)
    config = config.with_({"train.steps": given(config, values, "train.steps"), "train.epochs": None})
    tell(config, values, say)
    sources = with_references(config, folder, say)
    values |= {path: (_plain(value), values[path][1]) for path, value in sources.items()}
    write_config(folder, config, values)
    written = load_config(folder / CONFIG)
    for note in config.notes:
        if note not in written.notes:  # else the run tells it
            say("note", note)
    return written


def usual_settings(request: Request, source: Checkpoint) -> Settings:
    """What suits all tunings."""
    stored = adapters_of(source)
    kind = "full" if request.full else "lora"
    name = Path(request.model).resolve().name if Path(request.model).exists() else request.model.rpartition("/")[2]
    ending = kind if request.objective in (None, "causal") else f"{request.objective}-{kind}"
    values: Settings = {
        "checkpoint.init_from": (request.model, "what is tuned"),
        "checkpoint.dir": (f"runs/{name}-{ending}", "the run's folder"),
    }
    if request.objective:
        values["train.objective"] = (request.objective, "--objective")
    if not request.full and not stored:
        values["finetune.lora.rank"] = (request.rank, "adapters beside the weights; --full trains all of them")
    return values


def tokenizer_settings_of(config: RunConfig, folder: Path) -> Settings:
    """The copy of the tokenizer in the run's folder, in place of the one that was named."""
    values: Settings = {"tokenizer.path": (str(folder / "data" / "tokenizer"), "a copy of the model's")}
    # They say how to read the original files; the copy is read as any saved tokenizer.
    named = [name for name in ("kind", "merges") if getattr(config.tokenizer, name)]
    return values | {f"tokenizer.{name}": (None, "") for name in named}


def load(values: Settings, request: Request, final: bool = False) -> RunConfig:
    """The config of the settings, the files and the words of the request, in this order.

    `final`: the data are those of the settings, and the steps say how long it trains. Raises ConfigError.
    """
    words = list(request.words)
    if final:
        words = [word for word in words if not word.startswith(SETTLED)]
    elif request.files:
        words.append(f"data.train={json.dumps(list(request.files))}")
    # Last of the files: a config of the user's may still name the records that have become corpora.
    settled = {path: entry for path, entry in values.items() if f"{path}=".startswith(SETTLED)} if final else {}
    files: list[Any] = [nested(values), *request.configs, nested(settled)]
    return load_config(files, words, any_batch=not final, any_data=not final)


def with_tokenizer(config: RunConfig, source: Checkpoint) -> RunConfig:
    """The config with the model's tokenizer, unless it names another one. Raises ConfigError where it names none, and
    CheckpointError where that is missing."""
    if any(path.startswith("tokenizer.") and by != NEOX_DEFAULT for path, by in config.origins.items()):
        return config
    words = tokenizer_settings(source)
    if words is None or not (words.path or words.kind):
        raise ConfigError(f"{source.path} names no tokenizer; give tokenizer.path")
    refuse_missing_tokenizer(source, words)
    return config.with_({"tokenizer": words})


def asked_for(config: RunConfig, request: Request) -> dict[str, Any]:
    """All that decides a run, to compare it with another start's."""
    options = {"--chat-template": request.template, "--skip-bad": request.skip_bad}
    # As it will be read back, where tuples are lists, so that equal requests compare equal.
    return json.loads(json.dumps(to_jsonable_python(changed(config) | options)))


def continued(folder: Path, asked: dict[str, Any], config: RunConfig) -> RunConfig:
    """The config that continues the run in a folder. Raises TrainingError if another command began it, and DataError if
    that names files that are none."""
    remembered = folder / REMEMBERED
    if not remembered.is_file():
        refuse_second_start(folder)
    before = read_json(remembered, TrainingError, SHAPE)["asked"] if remembered.is_file() else {}
    if before == asked:
        return load_run(folder)
    kinds_of(config)
    differing = [key for key in {**before, **asked} if before.get(key) != asked.get(key)]
    lines = "".join(f"\n  {key}: {_short(before.get(key))} then, {_short(asked.get(key))} now" for key in differing)
    raise TrainingError(
        f"{folder} holds a run that another command began:{lines}\nTo continue it: castalia train {folder}. To begin "
        f"another one: checkpoint.dir={folder}-2"
    )


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) and "path" in each for each in value):
        value = [each["path"] for each in value]  # files to learn from, whose other settings are defaults
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 60 else f"{text[:12]}...{text[-42:]}"  # paths mostly differ at their ends


def lessons_of(
    config: RunConfig, source: Checkpoint, request: Request, folder: Path, asked: dict[str, Any], say: Say
) -> Lessons:
    """The corpora of all files, made now or by an earlier start of the same command."""
    remembered = folder / REMEMBERED
    if remembered.is_file() and (known := read_json(remembered, TrainingError, SHAPE))["asked"] == asked:
        parts = {name: tuple(Source(**each) for each in known[name]) for name in ("train", "valid")}
        return Lessons(**parts, kind=known["kind"])
    if not config.data.train:
        raise ConfigError(
            "what is it to learn? Give a file after the model, a jsonl with a text, a conversation or a preference in "
            f"each line: castalia finetune {request.model} chat.jsonl"
        )
    kinds = kinds_of(config)
    lessons = prepared(config, source, request, folder / "data", kinds, say)
    remember(remembered, asked, lessons)
    return lessons


def kinds_of(config: RunConfig) -> dict[str, Kind]:
    """What the records of each file are, by its path; sources that are corpora have none.

    Raises DataError for files that are missing, that are not data, or whose records differ in kind.
    """
    kinds: dict[str, Kind] = {}
    for each in (*config.data.train, *config.data.valid):
        path = Path(each.path)
        if path.suffix in (".yml", ".yaml"):
            raise DataError(f"{path} is a config, no data: name it after the data, castalia finetune MODEL DATA {path}")
        if path.is_file():
            kinds[each.path] = kind_of_file(path, config.train.objective)
        elif path.is_dir():
            raise DataError(f"{path} is a folder; name the files in it, each a jsonl, json, parquet or text")
        elif not Path(f"{path}.idx").is_file():
            raise DataError(f"{path}: there is no such file, nor a corpus of that name ({path}.bin and {path}.idx)")
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path}: {kind}" for path, kind in kinds.items())
        raise DataError(f"the files hold records of different kinds, which do not learn together: {listed}")
    return kinds


def prepared(
    config: RunConfig, source: Checkpoint, request: Request, folder: Path, kinds: dict[str, Kind], say: Say
) -> Lessons:
    """Files turned into corpora in the folder, with a part held out where no validation data are named."""
    tokenizer = load_tokenizer(config.tokenizer, neox=config.neox_exact, model=model_folder(source))
    own = folder / "tokenizer"
    tokenizer.save(own)
    kind = next(iter(kinds.values()), None)
    chat = template_for(request.template, tokenizer, say if kind not in ("text", None) else lambda *_: None)
    if kind not in ("text", None) and tokenizer.folder.template != chat.template:
        write_text(own / JINJA, chat.template)  # with which `castalia chat` and other programs ask the model
    words = own
    if config.finetune.add_tokens:
        add_tokens(tokenizer, config.finetune.add_tokens)
        words = folder / "tokenizer_with_added"
        tokenizer.save(words)
    objective = config.train.objective
    parts: dict[str, list[Source]] = {"train": [], "valid": []}
    for split, number, each in _each(config):
        if each.path not in kinds:
            parts[split].append(each)
            continue
        path, prefix = Path(each.path), folder / f"{split}{number}"
        if kinds[each.path] != "text":
            say_of_strings(path, chat, say)
        lesson = make_lesson(path, kinds[each.path], prefix, words, chat, objective, request.skip_bad, say)
        for name, part in _divided(lesson, prefix, split, bool(config.data.valid), say):
            parts[name].append(part.source().with_({"weight": each.weight}))
    return Lessons(tuple(parts["train"]), tuple(parts["valid"]), kind)


def _each(config: RunConfig) -> Iterator[tuple[str, int, Source]]:
    for split in ("train", "valid"):
        for number, each in enumerate(getattr(config.data, split)):
            yield split, number, each


def _divided(lesson: Lesson, prefix: Path, split: str, has_valid: bool, say: Say) -> Iterator[tuple[str, Lesson]]:
    """The lesson by the split that each part of it belongs to."""
    if split == "valid" or has_valid:
        yield split, lesson
        return
    kept, held = divide(lesson, prefix)
    yield "train", kept
    if held is None:
        say("held out", "nothing: there are too few to judge the model by some of them (data.valid=FILE)")
        return
    counts = [len(open_dataset(part.sides[0].path)) for part in (kept, held)]
    say("held out", f"{counts[1]:,} of {sum(counts):,}, by a hash of each, to judge the model by (data.valid=FILE)")
    remove(lesson)
    yield "valid", held


def data_settings(lessons: Lessons) -> Settings:
    """The corpora as settings."""
    values: Settings = {"data.train": (_plain(lessons.train), "")}
    return values | ({"data.valid": (_plain(lessons.valid), "what the model is judged by")} if lessons.valid else {})


def _plain(sources: Any) -> Any:
    if isinstance(sources, Source):
        return sources.model_dump(exclude_defaults=True)
    return [source.model_dump(exclude_defaults=True) for source in sources]


def fitting(config: RunConfig, source: Checkpoint, lessons: Lessons, processes: int) -> Settings:
    """The settings that follow from the sizes of data, model and machine."""
    sources = lessons.train
    sides = [np.concatenate([open_dataset(each.path).sizes for each in sources])]
    if all(each.rejected for each in sources):
        sides.append(np.concatenate([open_dataset(each.rejected.path).sizes for each in sources if each.rejected]))
    held_out = sum(len(open_dataset(each.path)) for each in lessons.valid)
    sizes = sizes_of(sides, held_out, all(each.labels for each in sources))
    device, memory = device_and_memory()
    if device == "cpu":
        memory //= processes
    precision = name_of(choose_dtype(config.precision.compute, choose_device(config.train.device)))
    kind = "LoRA" if config.finetune.lora or adapters_of(source) else "full"
    return choose(config, architecture(source), sizes, memory, device, precision, kind, processes)


def tell(config: RunConfig, values: Settings, say: Say) -> None:
    """The chosen settings that matter most, with their reasons."""
    for path, (name, between) in TOLD.items():
        value, why = values.get(path, (None, ""))
        if value is not None and config.at(path) == value:  # else it was given otherwise
            say(name, f"{value:,}{between}{why}" if isinstance(value, int) else f"{value}{between}{why}")


def with_references(config: RunConfig, folder: Path, say: Say) -> dict[str, tuple[Source, ...]]:
    """The sources with log-probabilities of the reference model, computed once, where that takes less than in training.

    In training every sample of every step takes a forward pass of the reference model, which is in memory all the time.
    """
    total = sum(len(open_dataset(each.path)) for each in config.data.train)
    read = (config.train.steps or 0) * (config.train.batch_size or 1)
    if not needs_reference(config) or read < total:
        return {}
    path = config.preference.reference or config.checkpoint.init_from
    checkpoint = open_checkpoint(str(path))
    say("reference", f"log-probabilities of {checkpoint.path}, computed once instead of in each step")
    device = choose_device(config.train.device)
    model = build_model(checkpoint, device, choose_dtype(config.precision.compute, device))

    def referred(text: Text) -> str:
        output = f"{folder / 'data' / Path(text.path).name}_reference"
        write_log_probabilities(model, text.path, output, config.data.seq_length, ROWS)
        return output

    def known(source: Source) -> Source:
        rejected = source.rejected and source.rejected.with_({"references": referred(source.rejected)})
        return source.with_({"references": referred(source), "rejected": rejected})

    splits = {f"data.{name}": getattr(config.data, name) for name in ("train", "valid")}
    return {name: tuple(map(known, sources)) for name, sources in splits.items() if sources}


def write_config(folder: Path, config: RunConfig, values: Settings) -> None:
    """Writes `finetune.yml`: what differs from the defaults, with reasons."""
    shown = {path: entry for path, entry in overridden(values, config).items() if path != "train.epochs"}
    for path in ("train.steps", "data.train", "data.valid"):
        if path in values:
            shown[path] = values[path]
    head = [
        "Written by `castalia finetune`. Each line says why; all other settings are the defaults.",
        f"The same once more, in another folder: castalia train {folder / CONFIG} checkpoint.dir={folder}-2",
        "",
    ]
    write_text(folder / CONFIG, commented(dict(sorted(shown.items(), key=_section)), head))


def _section(item: tuple[str, Any]) -> tuple[int, str]:
    order: Sequence[str] = list(RunConfig.model_fields)
    return order.index(item[0].partition(".")[0]), ""
