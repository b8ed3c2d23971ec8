"""The prompts that a config names: those of a file, or an empty one."""

from __future__ import annotations

from pathlib import Path

from castalia.config.schema import GenerateConfig
from castalia.errors import ConfigError, DataError, refuse_pointer
from castalia.reading import parse_json


def prompts_of(settings: GenerateConfig) -> list[str]:
    """Those of the input file, one a line, or an empty one for a whole document. Raises ConfigError or DataError."""
    if settings.mode != "input-file":
        return [""]
    if settings.input_file is None:
        raise ConfigError("generate.mode=input-file needs generate.input_file, a file with a prompt on each line")
    try:
        lines = Path(settings.input_file).read_text(encoding="utf-8-sig").split("\n")  # at no other kind of line end
    except UnicodeDecodeError as error:
        raise DataError(f"{settings.input_file}: not UTF-8 at byte {error.start}") from error
    refuse_pointer(settings.input_file, lines[0].encode(), DataError)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{settings.input_file} has no prompt; write one on each line")
    if settings.input_file.endswith(".jsonl"):
        named = [(line, f"{settings.input_file}:{number}") for number, line in enumerate(lines, 1)]
        return [_prompt_of(line, where) for line, where in named if line.strip()]
    return prompts


def _prompt_of(line: str, where: str) -> str:
    """The prompt on a line of JSON."""
    value = parse_json(line, where, DataError)
    prompt = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise DataError(f'{where}: neither a string nor an object with a string "prompt" or "text"')
    return prompt
