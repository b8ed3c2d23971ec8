"""Which tensors of a model train, and what a run adds to it: adapters and entries of the vocabulary."""

from __future__ import annotations

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import CompleteConfig, FinetuneConfig, ModelConfig, RunConfig, is_adapter
from castalia.config.tensor_table import adapter_shapes, in_one_block, tensor_shapes
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CheckpointError, ConfigError
from castalia.model.init import seeded_tensor
from castalia.parallel.executor import Executor
from castalia.reading import fits


def what_trains(config: RunConfig, source: Checkpoint | None, model: ModelConfig) -> FinetuneConfig:
    """`finetune` with the adapters of the checkpoint, where it has some.

    Raises ConfigError for adapters without a model to adapt and for patterns that match nothing, CheckpointError for
    adapters other than the config's.
    """
    wanted, stored = config.finetune, adapters_of(source)
    if wanted.lora and source is None:
        raise ConfigError(
            f"{config.place('finetune.lora', 'finetune.lora.rank')}finetune.lora adapts a model that is there already, "
            "but nothing is loaded: name it with checkpoint.init_from"
        )
    if wanted.lora and stored and wanted.lora != stored:
        assert source is not None
        raise CheckpointError(
            f"{source.path} has adapters already, with {stored}, but finetune.lora asks for {wanted.lora}. Leave it "
            f"out to train those on, or merge them first: castalia merge-lora {source.path} OUT --to native"
        )
    chosen = wanted.with_({"lora": wanted.lora or stored})
    sized = model.with_({"vocab_size": model.vocab_size or 1})  # only the names matter
    # Patterns are checked against all tensors of the run, because other pipeline stages hold some of them.
    names = [*tensor_shapes(sized), *adapter_shapes(sized, chosen.lora)]
    kinds = ", ".join(in_one_block(names))
    for key in ("train", "freeze"):
        for pattern in getattr(chosen, key):
            if not any(fits(pattern, name) for name in names):
                raise ConfigError(f"finetune.{key}: {pattern!r} matches no tensor; there are {kinds}")
    if not any(map(chosen.trains, names)):
        raise ConfigError("finetune.train and finetune.freeze leave nothing that trains")
    return chosen


def trained_names(config: CompleteConfig) -> list[str]:
    """The names of all tensors that train, on whichever rank."""
    every = [*tensor_shapes(config.model), *adapter_shapes(config.model, config.finetune.lora)]
    return [name for name in every if config.finetune.trains(name)]


def num_added_tokens(config: CompleteConfig, source: Checkpoint | None) -> int:
    """How many entries `finetune.add_tokens` adds to the vocabulary of the checkpoint that a run begins from."""
    if source is None or not config.checkpoint.init_from or not config.finetune.add_tokens:
        return 0
    if source.format == "native" and source.config and source.config.model and source.config.model.vocab_size:
        return config.vocab_size - source.config.model.vocab_size
    return config.vocab_size - load_tokenizer(config.tokenizer).vocab_size  # other formats' sizes include padding


def start_adapters(executor: Executor, config: CompleteConfig, source: Checkpoint | None) -> None:
    """Sets adapters that were not loaded to their initial values, which have no effect: `lora_b` is zero."""
    for name, parameter in executor.parameters.items():
        if is_adapter(name) and (source is None or adapters_of(source) is None):
            part = executor.part(parameter)
            part.local.copy_(seeded_tensor(config.model, config.seed, name, part.shape, part.slices))
