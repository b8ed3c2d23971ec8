"""Castalia: train, inspect, convert, evaluate and run GPT-style language models on plain PyTorch.

Names load on first use, so that `import castalia` brings in neither torch nor pydantic.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "castalia.config.load",
    "open_dataset": "castalia.data.indexed",
    "batch_at": "castalia.data.loader",
    "open_checkpoint": "castalia.checkpoint.formats",
    "load_model": "castalia.checkpoint.load",
    "train": "castalia.cli.train",
    "generate": "castalia.generate.engine",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'castalia' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
