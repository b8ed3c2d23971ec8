"""Which of the files that a run starts from are not there; needs nothing slow, such as torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from castalia.config.schema import RunConfig


def missing_files(config: RunConfig) -> Iterator[str]:
    """A line for the checkpoint to load, each corpus and each file of the tokenizer that are not there."""
    if nothing := nothing_to_load(config):
        yield nothing
    yield from _missing_data(config)
    yield from missing_tokenizer(config)


def nothing_to_load(config: RunConfig) -> str | None:
    """A line about the checkpoint to load, if it is not there."""
    wanted = config.checkpoint
    key, path = ("init_from", wanted.init_from) if wanted.init_from else ("resume", wanted.resume)
    if path is None or wanted.starts_if_empty:
        return None
    folder = Path(path).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.exists() and path.count("/") == 1 and not path.startswith(("/", ".", "~")):
        return None  # perhaps a Hugging Face model name, which is looked up in the local cache when it is opened
    start = f"{config.place(f'checkpoint.{key}')}checkpoint.{key}={path}: "
    what = "the folder is empty" if folder.exists() else "there is no such folder"
    if key == "resume":
        return f"{start}{what}, so there is nothing to resume; name the run's folder, or leave it out for a new run"
    model = config.model
    random = "" if model is None else f" The {model.num_layers} layers x {model.hidden_size} of this config would be a "
    random += "new model with random weights." if model else ""
    return (
        f"{start}{what}, so there is nothing to fine-tune.{random} Name the folder that holds the checkpoint (NeoX: "
        "load); to train a new model from scratch, leave checkpoint.init_from out (NeoX: load and finetune)."
    )


def _missing_data(config: RunConfig) -> Iterator[str]:
    if (rows := config.data.intervene) and not Path(rows).is_file():
        yield f"{config.place('data.intervene')}data.intervene={rows}: there is no such file"
    named: dict[str, list[str]] = {config.data.path: ["data.path"]} if config.data.path else {}
    for split in ("train", "valid", "test"):
        for prefix in (prefix for source in getattr(config.data, split) for prefix in source.prefixes):
            named.setdefault(prefix, []).append(f"data.{split}")
    for prefix in (prefix for stage in config.data.stages for source in stage.train for prefix in source.prefixes):
        named.setdefault(prefix, []).append("data.stages")
    for prefix, all_keys in named.items():
        keys = list(dict.fromkeys(all_keys))
        gone = [f"{prefix}.{end}" for end in ("bin", "idx") if not Path(f"{prefix}.{end}").is_file()]
        start = f"{config.place(*keys)}{', '.join(keys)}={prefix}: "
        name = Path(prefix).stem
        if gone and Path(prefix).suffix == ".npy" and Path(prefix).exists():
            yield (
                f"{start}these are published token ids; `castalia data index {prefix} --tokenizer FILE --output tokens"
                f"` makes a corpus of them as they are, {keys[0]}=tokens/{name}"
            )
        elif gone and Path(prefix).exists():
            yield (
                f"{start}this is text, no corpus; `castalia data prepare {prefix} --tokenizer FILE --output {name}` "
                f"makes one, {keys[0]}={name}_text_document"
            )
        elif gone:
            yield (
                f"{start}{' and '.join(gone)} {_are(gone)} missing; make the corpus with `castalia data prepare`, or "
                "name it as its files are called, without .bin and .idx"
            )


def missing_tokenizer(config: RunConfig) -> Iterator[str]:
    """A line for each of the tokenizer's files that the config names and that is not there."""
    for key in ("path", "merges"):
        path = getattr(config.tokenizer, key)
        if path and not Path(path).expanduser().exists():
            name = f"tokenizer.{key}"
            yield f"{config.place(name)}{name}={path}: there is no such file; give {name}=FILE"


def _are(things: list[str]) -> str:
    return "are" if len(things) > 1 else "is"
