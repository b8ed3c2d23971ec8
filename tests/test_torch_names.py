import ast
import json
import re

import pytest

from tests.torch_names import ROOT, TABLES, lacking, names_in, parameters, used_names

USED = used_names()


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_each_supported_torch_has_what_is_used(path):
    """A name that is new to the code has to be looked up in each version: make test-torch TORCH=torch==VERSION."""
    assert lacking(USED, json.loads(path.read_text())) == []


def test_the_oldest_supported_torch_has_a_table():
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert any(path.stem.startswith(f"{oldest}.") for path in TABLES.glob("*.json"))


def test_names_and_keywords_are_found_under_any_alias():
    code = """
import torch, torch.distributed as dist
from torch.nn import functional as F
def f(x):
    from torch.distributed.launcher.api import LaunchConfig
    torch._foreach_mul_(x, 2)
    return F.pad(dist.all_reduce(x, async_op=True), (1, 1), value=x.torch), LaunchConfig(1, run_id="")
"""
    found = {name: keywords for name, keywords in names_in(ast.parse(code)) if keywords}
    assert found == {
        "torch.nn.functional.pad": {"value"},
        "torch.distributed.all_reduce": {"async_op"},
        "torch.distributed.launcher.api.LaunchConfig": {"run_id"},
    }
    names = {name for name, _ in names_in(ast.parse(code))}
    assert "torch._foreach_mul_" in names
    assert not any(name.endswith("x.torch") for name in names)


def test_what_is_lacking_is_named():
    table = {"torch.empty": parameters("torch.empty"), "torch.load": ["**"], "torch.finfo": None}
    used = {"torch.empty": {"dtype", "colour"}, "torch.load": {"any"}, "torch.finfo": {"any"}, "torch.gone": set()}
    assert lacking(used, table) == ["torch.empty(colour=)", "torch.gone"]


def test_a_name_that_torch_has_not():
    with pytest.raises(AttributeError, match="gone"):
        parameters("torch.distributed.gone")
