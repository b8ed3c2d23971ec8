"""`castalia activations`: the residual stream of texts, as a file of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    path: Annotated[str, typer.Argument(metavar="CKPT", help="a run, or a checkpoint of any format")],
    file: Annotated[Path, typer.Option(help="texts: jsonl with `text`, or another kind that `data prepare` reads")],
    layers: Annotated[str, typer.Option(help="0,5 or all: 0 enters the first block, n leaves the n-th")],
    output: Annotated[Path, typer.Option(help="the file to write: NAME.safetensors")],
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object that says what was written")] = False,
) -> None:
    """Write what each token is inside the model: the residual stream at chosen layers, in fp32.

    \b
    Examples:
      castalia activations runs/first --file texts.jsonl --layers 0,1 --output a.safetensors
      castalia activations runs/first --file texts.jsonl --layers all --output b.safetensors --step 10

    The file has layer_N [tokens, hidden size], ids [tokens] and starts [texts + 1], where each text begins. Layers are
    taken before the final norm.
    """
    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.cli.opening import open_and_tell
    from castalia.cli.render import progress
    from castalia.errors import ConfigError, DataError
    from castalia.examine.residuals import parse_layers, write_activations
    from castalia.loading import build_model
    from castalia.strict_json import to_json
    from castalia.train.hardware import choose_device
    from castalia.units import file_size

    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: the file's name ends with .safetensors")
    if not file.exists():
        raise DataError(f"--file {file}: there is no such file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.absolute().parent}")
    checkpoint = open_and_tell(path, step=step)
    words = load_tokenizer_for(checkpoint, tokenizer)
    model = build_model(checkpoint, choose_device("auto"))
    chosen = parse_layers(layers, model.cfg.num_layers)
    with progress() as advance:
        tokens = write_activations(model, words, file, chosen, output, advance)
    if as_json:
        size = {"hidden_size": model.cfg.hidden_size, "bytes": output.stat().st_size}
        print(to_json({"path": str(output), "tokens": tokens, "layers": list(chosen), **size}))
        return
    shown = ", ".join(map(str, chosen))
    print(f"{output}: {tokens:,} tokens, layers {shown}, {model.cfg.hidden_size} values each")
    print(f"{file_size(output.stat().st_size)} on disk")
