"""Config files and overrides become one `RunConfig` that records where each value came from.

In this order: read all files (`yaml_files.py`), separate our keys from GPT-NeoX's, merge each kind (later sources
win), translate GPT-NeoX's keys once (`neox/read.py`), validate (`schema.py`), look for contradictions (`check.py`).
All problems are reported together, one line each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from castalia.config import check
from castalia.config.fields import FIELDS, SECTIONS, describe
from castalia.config.lora_names import key_of_others, translate_targets
from castalia.config.neox import read as neox_read
from castalia.config.schema import RunConfig
from castalia.config.setting import NEOX_DEFAULT, Setting, put
from castalia.config.yaml_files import (
    Findings,
    YamlMapping,
    already_given,
    merged,
    read_file,
    read_override,
    read_text,
    to_yaml,
)
from castalia.errors import ConfigError
from castalia.reading import reason, short

INTERVENTIONS = "interventions.jsonl"  # file, inside a run's folder, with what its rows were changed to
TOKENIZER = "tokenizer"  # folder, inside a run's folder, with its tokenizer
PRESETS = Path(__file__).parent / "presets"
# Settings whose value was another one before they existed. Runs write all that they know, so a config that has all of
# these sections and lacks such a setting is older.
EARLIER = {"data": {"holdout": "contiguous", "shuffled_passes": None}}
OF_EACH_RUN = {"model", "data", "tokenizer", "optimizer", "schedule", "parallel", "precision", "train", "checkpoint"}
OF_EACH_RUN |= {"log", "watch", "eval", "seed", "neox_exact"}
# What GPT-NeoX does with its data, for configs of ours that repeat its training.
OF_NEOX_EXACT = {"data.holdout": "contiguous", "data.shuffled_passes": None}
DATA_ENDINGS = (".jsonl", ".parquet", ".txt", ".md")
# Pairs of groups of which a config uses one; a later file's choice replaces an earlier file's.
ALTERNATIVES = (
    (("data.path",), ("data.train", "data.valid", "data.test")),
    (("train.steps",), ("train.epochs",)),
    (("checkpoint.resume",), ("checkpoint.init_from",)),
)


def load_config(
    files: str | Path | Iterable[str | Path | RunConfig | dict],
    overrides: Sequence[str] = (),
    any_batch: bool = False,
    any_data: bool = False,
) -> RunConfig:
    """The config that `files` and then `overrides` describe; where they disagree, the later one wins.

    `files` are paths, run folders or names of presets, in our terms (nested) or GPT-NeoX's (flat). A folder of GPT-NeoX
    checkpoints stands for the configs in it; a RunConfig or a mapping of keys may take the place of a file.
    `overrides` are such as `optimizer.lr=6e-4` or `train_iters=200`. `any_batch`: accept a batch that does not divide
    into micro-batches. `any_data`: accept sources that are files of records, of which corpora will be made.
    Raises ConfigError with one line for each problem.
    """
    findings = Findings()
    given = [files] if isinstance(files, str | Path) else files
    names = [each for name in given for each in _with_neox_folder(name)]
    sources = [_read(name, findings) for name in names] + [_override(text, findings) for text in overrides]
    # GPT-NeoX's keys are merged before they are translated, because joint keys may come from different sources.
    ours: dict[str, Setting] = {}
    neox: dict[str, Setting] = {}
    for precedence, table in enumerate(sources):
        _sort(table, precedence, ours, neox, findings)
    settings = _combine(ours, neox_read.translate(neox, ours, num_files=len(names), findings=findings), findings)
    if (exact := settings.get("neox_exact")) and exact.value is True:
        settings = {path: Setting(value, NEOX_DEFAULT, -1) for path, value in OF_NEOX_EXACT.items()} | settings
    _choose_alternatives(settings, findings)
    _shrink_micro_batch(settings, findings)
    translate_targets(settings, findings)
    config = _validate(settings, findings)
    if config is not None:
        config._origins = {path: setting.where for path, setting in settings.items()}
        check.check(config, findings, any_batch, any_data)
    if findings.errors or config is None:  # one mistake can be found by several rules: each line appears once
        raise ConfigError("\n".join(dict.fromkeys(findings.errors)))
    config._notes = tuple(dict.fromkeys(findings.notes))
    return config


def neox_config_files(folder: Path) -> list[Path]:
    """The configs that GPT-NeoX stored with a checkpoint: in a step's folder, or in the one that `latest` names."""
    latest = folder / "latest"
    steps = [folder / Path(latest.read_text(errors="replace").strip()).name] if latest.is_file() else []
    stored = (sorted((step / "configs").glob("*.y*ml")) for step in [folder, *steps])
    return next(filter(None, stored), [])


def load_neox_run(folder: Path, overrides: Sequence[str] = (), any_batch: bool = False) -> RunConfig:
    """The config with which training continues from a folder of GPT-NeoX, in a folder of its own, else runs/NAME.

    A tokenizer file or a corpus that the config names and that is not there is looked for beside the checkpoint.
    """
    name = folder.resolve().name if (folder / "latest").is_file() else folder.resolve().parent.name
    places = {"checkpoint.resume": str(folder), "checkpoint.dir": f"runs/{name}"}
    if any(word.startswith(("checkpoint.dir=", "save=")) for word in overrides):
        del places["checkpoint.dir"]
    words = [*(f"{key}={json.dumps(value)}" for key, value in places.items()), *overrides]
    config = load_config(folder, words, any_batch)
    named = {key: getattr(config.tokenizer, key) for key in ("path", "merges")}
    files = {key: beside(folder, path) for key, path in named.items() if path}
    config = config.with_({f"tokenizer.{key}": path for key, path in files.items() if path != named[key]})
    sources = {f"data.{split}": getattr(config.data, split) for split in ("train", "valid", "test")}
    data: dict[str, Any] = {"data.path": config.data.path and _corpus_beside(folder, config.data.path)}
    data |= {key: [_source_beside(folder, each.model_dump()) for each in given] for key, given in sources.items()}
    return config.with_({key: value for key, value in data.items() if value})


def _source_beside(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A source's values with each corpus where it is: all of its texts are prefixes of corpora."""
    beside = {name: _corpus_beside(folder, value) for name, value in values.items() if isinstance(value, str)}
    inner = {name: _source_beside(folder, value) for name, value in values.items() if isinstance(value, dict)}
    return values | beside | inner


def _corpus_beside(folder: Path, prefix: str) -> str:
    """The prefix of a corpus, here or, for a relative one, below the folder of the checkpoint or one of the two above
    it, in which its program may have run."""
    places = (parent / prefix for parent in (folder, *folder.resolve().parents[:2]))
    return next((str(place) for place in (Path(prefix), *places) if Path(f"{place}.idx").is_file()), prefix)


def beside(folder: Path, path: str) -> str:
    """A path that a checkpoint's config names: as it is below the checkpoint's folder or here, else the file of that
    name in the folder or one of the two above it."""
    above = (parent / Path(path).name for parent in (folder, *folder.resolve().parents[:2]))
    return str(next((place for place in (folder / path, Path(path), *above) if place.exists()), path))


def load_run(folder: str | Path, overrides: Sequence[str] = (), any_batch: bool = False) -> RunConfig:
    """The config that resumes the run in a folder from its last checkpoint, or starts it again if there is none."""
    run = Path(folder)
    places = {"checkpoint.dir": run, "checkpoint.resume": run}
    # Overrides, because the config in the folder may have been written under another path.
    words = [*(f"{key}={json.dumps(str(path))}" for key, path in places.items()), *overrides]
    config = load_config(run, words, any_batch)
    # Loading `resume` removed `init_from`; a run that died before its first save still needs its initial weights.
    if config.checkpoint.resume and not any(run.glob("checkpoints/step_*/manifest.json")):
        began_from = load_config(run).checkpoint.init_from
        config = config.with_({"checkpoint.init_from": began_from})
    return config


def as_it_was(stored: dict[str, Any]) -> None:
    """Complete the config that a run wrote, in place, by the settings that did not exist when it did."""
    if not stored.keys() >= OF_EACH_RUN:
        return
    for section, values in EARLIER.items():
        for name, value in values.items() if isinstance(stored[section], dict) else ():
            if name not in stored[section]:
                stored[section][name] = value
                if isinstance(stored, YamlMapping):
                    stored[section].origins[name] = f"{stored.origins[section]}, older than {name}"


def dump_config(config: RunConfig) -> str:
    """The complete YAML of a config; loading it gives an equal config."""
    return to_yaml(config.model_dump(mode="json"))


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yml"))


def _with_neox_folder(name: str | Path | RunConfig | dict) -> list[Any]:
    if isinstance(name, str | Path) and Path(name).is_dir() and not (Path(name) / "config.yml").is_file():
        return neox_config_files(Path(name)) or [name]
    return [name]


def _read(name: str | Path | RunConfig | dict, findings: Findings) -> YamlMapping:
    if isinstance(name, RunConfig):
        return read_text(dump_config(name), "checkpoint", findings)
    if isinstance(name, YamlMapping):
        return name
    if isinstance(name, dict):
        return read_text(to_yaml(name), "keys", findings)
    path = Path(name)
    if (path / "config.yml").is_file():
        path = path / "config.yml"
    if path.suffix in DATA_ENDINGS:
        raise ConfigError(
            f"{name} holds data, not settings: castalia finetune MODEL {name} teaches them to a model, castalia start "
            f"{name} trains a new one"
        )
    if path.is_file():
        return _with_own_files(read_file(path, str(path), findings), path.parent)
    preset = PRESETS / f"{str(name).removesuffix('.yml').lower()}.yml"
    if preset.is_file():
        return read_file(preset, f"preset {preset.stem}", findings)
    if path.with_name(path.name + ".yml").is_file():
        path = path.with_name(path.name + ".yml")
        return read_file(path, str(path), findings)
    if path.is_dir():
        raise ConfigError(
            f"{name}: this folder holds no config.yml of a run and no configs/*.yml of GPT-NeoX; name a config file, a "
            f"run's folder or a preset. From text that lies there, castalia start {name} makes a model; to train one "
            f"that lies there: castalia train CONFIG checkpoint.init_from={name}"
        )
    raise ConfigError(f"{name}: no such file, and no preset has this name; {_near_presets(path.stem.lower())}")


def _near_presets(name: str) -> str:
    presets = preset_names()
    if near := [preset for preset in presets if name in preset] or get_close_matches(name, presets, cutoff=0.5):
        return f"presets: {', '.join(near)}"
    families = {preset.partition("-")[0]: preset for preset in reversed(presets)}
    return f"there are {len(presets)} presets, such as {', '.join(sorted(families.values()))}"


def _with_own_files(table: YamlMapping, run: Path) -> YamlMapping:
    """Resolve the relative paths of a run's own tokenizer and interventions, so that its folder may be moved."""
    as_it_was(table)
    data = table.get("data")
    if isinstance(data, YamlMapping) and data.get("intervene") == INTERVENTIONS and (run / INTERVENTIONS).is_file():
        data["intervene"] = str(run / INTERVENTIONS)
    tokenizer = table.get("tokenizer")
    if isinstance(tokenizer, YamlMapping) and tokenizer.get("path") == TOKENIZER and (run / TOKENIZER).is_dir():
        tokenizer["path"] = str(run / TOKENIZER)
    return table


def _override(text: str, findings: Findings) -> YamlMapping:
    key, value = read_override(text, findings)
    return YamlMapping({key: value}, {key: "command line"})


def _sort(
    table: YamlMapping, precedence: int, ours: dict[str, Setting], neox: dict[str, Setting], findings: Findings
) -> None:
    """Merge one source into `ours`, by dotted path, and `neox`, by GPT-NeoX's key."""
    for written, value in table.items():
        # GPT-NeoX accepts dashes in keys, as on its command line.
        key, origin = written.replace("-", "_"), table.origins[written]
        block, *inner = key.split(".")
        if written in table.earlier:
            twice = f"{origin}: {already_given(written, table.earlier[written])}"
            if neox_read.is_neox(key, value):  # as in its rwkv/170M.yml
                findings.notes.append(f"{twice}: as in GPT-NeoX the last one counts")
            else:
                findings.errors.append(f"{twice}; keep one")
        if inner and key not in FIELDS and key not in SECTIONS and block in neox_read.KEYS:
            for name in reversed(inner):  # zero_optimization.stage=2 becomes zero_optimization: {stage: 2}
                value = YamlMapping({name: value}, {name: origin})
            key = block
        if key in neox_read.FORMER and neox_read.FORMER[key].kind == "renamed":
            findings.notes.append(f"{origin}: {written} is called {neox_read.FORMER[key].target} today")
            key, origin = neox_read.FORMER[key].target, f"{origin} ({written})"
        if neox_read.is_neox(key, value):
            if key in neox and neox[key].precedence == precedence:
                findings.errors.append(f"{origin}: {written} is already given at {neox[key].origin}; keep one")
            else:
                if key in neox:
                    value = merged(neox[key].value, neox[key].precedence, value, precedence)
                put(neox, key, Setting(value, origin, precedence))
        else:
            _flatten(written, Setting(value, origin, precedence), ours, findings)


def _flatten(path: str, setting: Setting, ours: dict[str, Setting], findings: Findings) -> None:
    value = setting.value
    if path in SECTIONS and isinstance(value, YamlMapping):
        # `model: {}` is left out, because a model without sizes would be an error in every overlay.
        if not value and path != "model" and not any(other.startswith(path + ".") for other in ours):
            put(ours, path, setting)  # `{}` switches an optional section on, with its defaults
        for key, inner in value.items():
            _flatten(f"{path}.{key}", Setting(inner, value.origins[key], setting.precedence), ours, findings)
    elif path in FIELDS or (path in SECTIONS and value is None):
        put(ours, path, setting)
    elif path in SECTIONS:
        findings.errors.append(
            f"{setting.origin}: {path}: {short(value)} is not a section; write `{path}:` and indent its keys below it"
        )
    else:
        others = key_of_others(path)
        findings.errors.append(f"{setting.origin}: unknown key {path}" + (f": {others}" if others else suggest(path)))


def suggest(path: str) -> str:
    """The end of a message about an unknown key: similar keys, or all keys of its section."""
    section, _, name = path.rpartition(".")
    # First keys of the same section that look alike, and the same name in another section (`lr`: optimizer.lr).
    siblings = {field.rpartition(".")[2]: field for field in FIELDS if field.rpartition(".")[0] == section}
    same_name = [field for field in FIELDS if field.rpartition(".")[2] == name.replace("-", "_")]
    close = [siblings[match] for match in get_close_matches(name.replace("-", "_"), siblings, n=2, cutoff=0.6)]
    if not close and not same_name and not section:
        close = get_close_matches(name.replace("-", "_"), [*neox_read.KEYS, *SECTIONS], n=2, cutoff=0.6)
    if not close and not same_name:
        close = _mentioning(name) or get_close_matches(path.replace("-", "_"), FIELDS, n=2, cutoff=0.6)
    names = list(dict.fromkeys(close + same_name))[:3]
    if names:
        return f"; did you mean {' or '.join(names)}?"
    known = [*siblings, *(name for name in SECTIONS if name.rpartition(".")[0] == section)]
    return f"; the keys of {section or 'a config'} are {', '.join(known)}"


def _mentioning(name: str) -> list[str]:
    """Keys that have the name as a part (`keep`: checkpoint.keep_last), else those it describes (`learning_rate`)."""
    parts = [field for field in FIELDS if f"_{name}_" in f"_{field.rpartition('.')[2]}_"]
    words = name.replace("-", "_").replace("_", " ")
    described = {field: (info.description or "").partition(":")[0] for field, info in FIELDS.items()}
    return parts or [field for field, text in described.items() if text.endswith(words)]


def _combine(ours: dict[str, Setting], translated: dict[str, Setting], findings: Findings) -> dict[str, Setting]:
    """Our settings and those translated from GPT-NeoX's keys; of two for one path the later source's wins."""
    settings: dict[str, Setting] = {}
    for path, setting in sorted([*translated.items(), *ours.items()], key=lambda item: item[1].precedence):
        old = settings.get(path)
        if old and old.precedence == setting.precedence:
            findings.errors.append(f"{setting.origin}: {path} is already given at {old.origin}; keep one")
        else:
            put(settings, path, setting)
    return settings


def _choose_alternatives(settings: dict[str, Setting], findings: Findings) -> None:
    """Drop the earlier source's choice of two groups that exclude each other; within one source that is an error."""
    for first, second in ALTERNATIVES:
        given = [
            [path for path in group if path in settings and settings[path].value not in (None, [])]
            for group in (first, second)
        ]
        if not all(given):
            continue
        older, newer = sorted(given, key=lambda paths: max(settings[path].precedence for path in paths))
        old, new = settings[older[0]], settings[newer[0]]
        if max(settings[p].precedence for p in older) == max(settings[p].precedence for p in newer):
            findings.errors.append(
                f"{new.origin}: {newer[0]} and {older[0]} ({old.origin}) exclude each other; keep one of them"
            )
            continue
        settings[newer[0]] = new._replace(replaced=f"{older[0]} of {old.origin}")
        for path in older:
            del settings[path]


def _shrink_micro_batch(settings: dict[str, Setting], findings: Findings) -> None:
    """Drop a micro-batch that is larger than the batch that a later source gives."""
    batch, micro = (settings.get(f"train.{name}") for name in ("batch_size", "micro_batch_size"))
    if not (batch and micro and isinstance(batch.value, int) and isinstance(micro.value, int)):
        return
    if batch.precedence > micro.precedence and batch.value < micro.value:
        findings.notes.append(
            f"{micro.origin}: train.micro_batch_size={micro.value} gives way to the smaller "
            f"train.batch_size={batch.value} ({batch.origin})"
        )
        del settings["train.micro_batch_size"]


def _validate(settings: dict[str, Setting], findings: Findings) -> RunConfig | None:
    # A file that only changes settings may say something of a model that another file will describe.
    core = ("model.num_layers", "model.hidden_size", "model.num_heads")
    model = [path for path in settings if path.startswith("model.")]
    if model and not any(path in settings for path in core):
        for path in model:
            setting = settings.pop(path)
            if setting.precedence >= 0:
                findings.notes.append(
                    f"{setting.origin}: {path} waits for a file that describes a model: {', '.join(core)} are not given"
                )
    nested: dict[str, Any] = {}
    for path, setting in settings.items():
        *parents, name = path.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = setting.value
    try:
        # From JSON, because pydantic's strict mode accepts lists for tuples and mappings for sections only there.
        return RunConfig.model_validate_json(json.dumps(nested, default=str), strict=True)
    except ValidationError as error:
        findings.errors += [_explain(problem, settings) for problem in error.errors()]
        return None


def _explain(problem: Any, settings: dict[str, Setting]) -> str:
    """One line for one of pydantic's errors: where, which value, why, and what is allowed."""
    path = ".".join(str(part) for part in problem["loc"])
    given = next((p for p in _ancestors(path) if p in settings), "")  # the setting that contains the value
    section = path.rpartition(".")[0]
    origins = [
        s.origin for p, s in settings.items() if s.precedence >= 0 and (p == given or p.startswith(section + "."))
    ]
    start = f"{settings[given].origin if given else origins[0] if origins else 'config'}: "
    allowed = describe(path if path in FIELDS else given)
    if problem["type"] == "missing" and given:
        return f"{start}{path} is missing; {given} is {allowed}"
    if problem["type"] == "missing":
        return f"{start}{path} is missing ({allowed}); give it, or name the file that holds it before this one"
    if problem["type"] == "extra_forbidden":
        return f"{start}unknown key {path}{suggest(path)}"
    value = "" if isinstance(problem["input"], dict) else f" {short(problem['input'])}:"
    return f"{start}{path}:{value} {_reason(problem)}; {allowed}"


def _reason(problem: Any) -> str:
    if problem["type"] in ("int_type", "float_type") and isinstance(problem["input"], str):
        try:
            float(problem["input"])
            return "is quoted text, not a number: remove the quotes"
        except ValueError:
            pass
    if problem["type"] == "literal_error":
        return f"is none of {problem['ctx']['expected']}"
    return reason(problem)


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
