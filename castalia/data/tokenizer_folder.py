"""The files of a tokenizer's folder: special tokens, ends of texts, chat template, defaults of generation.

The files are those that the library `transformers` writes. They are read here, once, and kept byte for byte, so that a
copy of the model has the same ones. The vocabulary itself is read in `tokenizer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from castalia.errors import DataError
from castalia.files import write_bytes
from castalia.reading import keys, read_bytes, read_json

VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
SETTINGS, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
JINJA, TEMPLATE = "chat_template.jinja", "chat_template.json"
GENERATION = "generation_config.json"
MODEL = "config.json"  # that of the whole model, of which a copy holds the token ids only
FILES = (*VOCABULARIES, SETTINGS, SPECIAL, ADDED, JINJA, TEMPLATE, GENERATION)
MORE_TEMPLATES = "additional_chat_templates"  # a folder
# The keys of generation_config.json and our names for them, and the values that `transformers` takes for missing keys.
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "max_new_tokens": "max_tokens"}
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}

FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
TOKEN: Any = keys({"content": str, **dict.fromkeys(FLAGS, bool)}, required=["content"])
TEMPLATE_ENTRY: Any = keys({"name": str, "template": str}, required=["name", "template"])
CONFIG_SHAPE = keys(  # of tokenizer_config.json and chat_template.json
    {
        "added_tokens_decoder": dict[str, TOKEN] | None,
        "additional_special_tokens": list[str | TOKEN] | None,
        "extra_special_tokens": list[str | TOKEN] | dict[str, Any] | None,
        "chat_template": str | list[TEMPLATE_ENTRY] | None,
    }
)
ADDED_TOKEN: Any = keys({"id": int, "content": str}, required=["id", "content"])
VOCABULARY = keys({"model": keys({"vocab": dict[str, int] | list}), "added_tokens": list[ADDED_TOKEN] | None})


class Added(NamedTuple):
    """A token that was added to the vocabulary, as `transformers` describes it."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TokenizerFolder:
    """What the files of a folder say. Whatever they do not say is empty."""

    files: Mapping[str, bytes] = field(default_factory=dict)  # contents by file name
    settings: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    special: Mapping[str, str] = field(default_factory=dict)  # the text of bos_token, eos_token, ...
    added: Mapping[int, Added] = field(default_factory=dict)  # added tokens by id
    token_ids: Mapping[str, Any] = field(default_factory=dict)  # of config.json: bos_token_id, ..., one id or a list
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    template: str | None = None  # the Jinja template of conversations
    places: Mapping[str, Path] = field(default_factory=dict)  # the paths of the files

    def sampling(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings with which `transformers` would sample, by our names, and all others that the file has set.

        Without `do_sample`, `transformers` always takes the likeliest token, whatever the temperature.
        """
        sampled = self.generation.get("do_sample") is True
        given = {name: value for name, value in self.generation.items() if value is not None}
        taken = (SAMPLED if sampled else {}) | {
            ours: given[name] for name, ours in SAMPLING.items() if name in given and (sampled or name not in SAMPLED)
        }
        rest = {
            name: value
            for name, value in given.items()
            if not (name.endswith("_token_id") or name.startswith("_") or name in ("do_sample", "transformers_version"))
            and SAMPLING.get(name) not in taken
            and value not in (0, 1, "", [], {})  # the values that switch a setting off
        }
        return taken, rest

    def ends(self, id_of: Callable[[str], int | None], size: int) -> tuple[int, ...]:
        """All ids that end a text, the one that ends a document first.

        `id_of` looks a token up in the vocabulary, which has `size` ids.
        """
        named = [id_of(self.special["eos_token"])] if "eos_token" in self.special else []
        for ids in (self.token_ids.get("eos_token_id"), self.generation.get("eos_token_id")):
            named += ids if isinstance(ids, list) else [ids]
        return tuple(dict.fromkeys(i for i in named if type(i) is int and 0 <= i < size))

    def without_vocabulary(self) -> TokenizerFolder:
        """The same folder without the files that describe the vocabulary, for a vocabulary that has changed."""
        kept = {name: data for name, data in self.files.items() if name not in (*VOCABULARIES, ADDED)}
        return replace(self, files=kept)


def read_tokenizer_folder(given: Mapping[str, Path], model: Path | None = None) -> TokenizerFolder:
    """Read the folder of a tokenizer.

    `given` are the files of the vocabulary by their usual names. The other files are those beside them; of a file with
    another name than the usual one, no others are read. `model` is the folder of the model, whose config.json and
    generation_config.json are read if there are none beside the vocabulary. Raises DataError for a damaged file.
    """
    paths = dict(given)
    folders = {path.parent for name, path in given.items() if path.name == name}
    for folder in (*folders, *([model] if model else ())):
        names = FILES if folder in folders else (GENERATION,)
        paths |= {name: folder / name for name in names if name not in paths and (folder / name).is_file()}
        if folder in folders:
            paths |= {
                f"{MORE_TEMPLATES}/{path.name}": path for path in sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja"))
            }
        if MODEL not in paths and (folder / MODEL).is_file():
            paths[MODEL] = folder / MODEL
    ids = {key: value for key, value in _table(paths.pop(MODEL, None)).items() if key.endswith("_token_id")}
    files = {name: read_bytes(path, DataError) for name, path in paths.items()}
    if ids:
        files[MODEL] = (json.dumps(ids, indent=2) + "\n").encode()
    settings = _table(paths.get(SETTINGS), CONFIG_SHAPE)
    special = _special(_table(paths.get(SPECIAL))) | _special(settings)
    template = _template(files.get(JINJA), settings, _table(paths.get(TEMPLATE), CONFIG_SHAPE), paths)
    try:
        added = _added(settings, _table(paths.get(ADDED)), set(special.values()))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{paths.get(SETTINGS)}: added_tokens_decoder is not understood: {error}") from error
    return TokenizerFolder(files, settings, special, added, ids, _table(paths.get(GENERATION)), template, paths)


def count_ids(vocabulary: Path) -> int:
    """One more than the largest id of a tokenizer.json or vocab.json and the files beside it.

    It builds no tokenizer, and so needs no engine. Raises DataError for a damaged file.
    """
    content, folder = _table(vocabulary, VOCABULARY), read_tokenizer_folder({vocabulary.name: vocabulary})
    model = content.get("model", {"vocab": content})
    entries = model.get("vocab", ())
    ids = {i for i in entries.values() if type(i) is int} if isinstance(entries, dict) else {len(entries) - 1}
    ids |= {token["id"] for token in content.get("added_tokens") or ()} if "model" in content else set()
    return max(ids | folder.added.keys(), default=-1) + 1


def _table(path: Path | None, shape: Any = dict[str, Any]) -> dict[str, Any]:
    return {} if path is None else read_json(path, DataError, shape)


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added(settings: Mapping[str, Any], simple: Mapping[str, Any], special: set[str]) -> dict[int, Added]:
    """Added tokens by id: those of `added_tokens_decoder`, and those that only the older added_tokens.json has."""
    further = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    special = special | set(map(_content, further)) if isinstance(further, list | tuple) else special
    added = {
        index: Added(content, content in special, normalized=content not in special)
        for content, index in simple.items()
        if type(index) is int
    }
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        known = {name: token[name] for name in Added._fields if name in token}
        added[int(index)] = Added(**known)
    return dict(sorted(added.items()))


def _template(
    jinja: bytes | None, settings: Mapping[str, Any], older: Mapping[str, Any], paths: Mapping[str, Path]
) -> str | None:
    """The chat template: chat_template.jinja, else of tokenizer_config.json, else of the older chat_template.json."""
    if jinja is not None:
        return decoded(jinja, paths[JINJA])
    template = settings.get("chat_template") or older.get("chat_template")
    if isinstance(template, list):  # several templates with names
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def decoded(data: bytes, path: Path) -> str:
    """The text of a file. Raises DataError if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder. Those that already have this content stay untouched."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and path.read_bytes() == data):
            write_bytes(path, data)


def ids_with_texts(ids: Iterable[int], text_of: Callable[[int], str | None]) -> str:
    """Ids with the texts of their tokens, for people: `2 (</s>), 7`."""
    return ", ".join(f"{i} ({text})" if (text := text_of(i)) else str(i) for i in ids)
