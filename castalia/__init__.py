"""Castalia: train, inspect, convert, evaluate and run GPT-style language models on plain PyTorch.

Names are imported on first use, so that `import castalia` imports neither torch nor pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `_PUBLIC` imports, for type checkers
    from castalia.checkpoint.opener import open_checkpoint as open_checkpoint
    from castalia.config.load import load_config as load_config
    from castalia.data.config_corpora import batch_at as batch_at
    from castalia.data.indexed import open_dataset as open_dataset
    from castalia.language_model import load_model as load_model
    from castalia.loading import tokenizer_at as load_tokenizer
    from castalia.series.members import open_series as open_series
    from castalia.train.from_python import run_training as run_training

__version__ = "0.1.0"

# None of these may be the name of a subpackage: importing the subpackage would replace the function.
_PUBLIC = {
    "load_config": ("castalia.config.load", "load_config"),
    "open_dataset": ("castalia.data.indexed", "open_dataset"),
    "batch_at": ("castalia.data.config_corpora", "batch_at"),
    "open_checkpoint": ("castalia.checkpoint.opener", "open_checkpoint"),
    "open_series": ("castalia.series.members", "open_series"),
    "load_model": ("castalia.language_model", "load_model"),
    "load_tokenizer": ("castalia.loading", "tokenizer_at"),
    "run_training": ("castalia.train.from_python", "run_training"),
}
__all__ = [
    "__version__",
    "batch_at",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "open_dataset",
    "open_series",
    "run_training",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'castalia' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
