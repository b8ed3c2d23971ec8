"""A Modelfile, by which Ollama makes a model of a GGUF file: what the tokenizer's folder says of texts and sampling.

Source: docs/modelfile.md at ollama/ollama. The chat template is in the GGUF file.
"""

from __future__ import annotations

import json
from pathlib import Path

from castalia.checkpoint.restore import architecture, load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint

PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "max_tokens": "num_predict"}


def modelfile_of(checkpoint: Checkpoint, file: Path) -> str:
    """The text of a Modelfile that lies beside the file. Raises CastaliaError without a tokenizer."""
    tokenizer, model = load_tokenizer_for(checkpoint), architecture(checkpoint)
    lines = [f"FROM ./{file.name}"]
    if model.max_positions:
        lines.append(f"PARAMETER num_ctx {model.max_positions}")
    ends = (tokenizer.token(index) for index in sorted(tokenizer.end_ids))
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends if text]
    taken, _ = tokenizer.folder.sampling()
    lines += [f"PARAMETER {PARAMETERS[name]} {value}" for name, value in taken.items()]
    if tokenizer.folder.template is not None:
        lines.append(
            "# The chat template is in the file. Ollama knows many; if not this one, give it here: TEMPLATE ..."
        )
    return "\n".join(lines) + "\n"
