"""Tensors by name, as people look them up in Python: also by the names of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from castalia.config.schema import ModelConfig
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef

if TYPE_CHECKING:
    from castalia.checkpoint.rules import Rule

T = TypeVar("T")


class NamedTensors(dict[str, T]):
    """A dict whose KeyError names what is near. `model`: of weights, which other programs' names find, too.

    A tensor that is found by another program's name is as that program holds it: rows of attention in its order, say.
    Iteration, `in` and `get` know the canonical names alone.
    """

    def __init__(self, tensors: Mapping[str, T], model: ModelConfig | None = None) -> None:
        super().__init__(tensors)
        self.model = model

    def __missing__(self, name: str) -> T:
        elsewhere = names_elsewhere(self, self.model) if self.model else {}  # type: ignore[arg-type]
        if name in elsewhere:
            return elsewhere[name]  # type: ignore[return-value]
        near = get_close_matches(name, [*self, *elsewhere], n=4, cutoff=0.5)
        listed = f"near it: {', '.join(near)}" if near else f"the first are {', '.join(list(self)[:4])}"
        raise KeyError(f"{name}; {listed}")


def names_elsewhere(tensors: Mapping[str, TensorRef], model: ModelConfig) -> dict[str, TensorRef]:
    """The tensors by the names of the Hugging Face class that computes the model, and by GPT-NeoX's `sequential.N...`.

    Programs that cannot hold the model are left out. Nothing is read.
    """
    from castalia.checkpoint.formats.huggingface import names as huggingface
    from castalia.checkpoint.formats.neox import names as neox

    found: dict[str, TensorRef] = {}
    try:
        family = huggingface.FAMILIES[huggingface.family_of(model, "")]
        for name, ref in _renamed(tensors, huggingface.table(family, model)).items():
            found[name if name == family.head else family.prefix + name] = ref
    except CheckpointError:
        pass  # no class of Hugging Face has a place for this model, so its names lead nowhere
    for era in (neox.LEGACY, neox.HEAD):
        try:
            rules = neox.table(era, model, 1, neox.neox_qkv(model, 1, "new"))
            found |= {f"sequential.{name}": ref for name, ref in _renamed(tensors, rules).items()}
        except CheckpointError:
            pass  # nor has GPT-NeoX
    return found


def _renamed(tensors: Mapping[str, TensorRef], rules: list[Rule]) -> dict[str, TensorRef]:
    from castalia.checkpoint.rules import to_theirs

    return {name: refs[0] for name, refs in to_theirs(rules, tensors).items()}
