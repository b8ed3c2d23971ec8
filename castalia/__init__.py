"""Castalia: train, inspect, convert, evaluate and run GPT-style language models on plain PyTorch.

Names are imported on first use, so that `import castalia` imports neither torch nor pydantic.
"""

from importlib import import_module

__version__ = "0.1.0"

# None of these may be the name of a subpackage: importing the subpackage would replace the function.
_PUBLIC = {
    "load_config": ("castalia.config.load", "load_config"),
    "open_dataset": ("castalia.data.indexed", "open_dataset"),
    "batch_at": ("castalia.data.config_corpora", "batch_at"),
    "open_checkpoint": ("castalia.checkpoint.opener", "open_checkpoint"),
    "load_model": ("castalia.loading", "load_model"),
    "load_tokenizer": ("castalia.loading", "tokenizer_at"),
    "run_training": ("castalia.cli.train", "train"),
    "generate_text": ("castalia.generate.text", "generate_text"),
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'castalia' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
