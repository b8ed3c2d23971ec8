"""Small models behind a server: in this process for what is asked of it, and one of its own for real clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from castalia.serve.app import build_app
from castalia.serve.catalogue import Catalogue
from castalia.serve.loaded_models import Library
from tests.tasks.conftest import llama, neox


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `neox`, byte-level and without a chat template, and `llama`, with words and a template."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    for make in (neox, llama):
        folder = place / make.__name__
        folder.mkdir()
        make(folder)
    return place


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(2_000_000_000, "cpu")


@pytest.fixture(scope="session")
def client(models: Path, library: Library) -> Iterator[TestClient]:
    with TestClient(build_app(Catalogue([str(models)]), library), base_url="http://localhost") as client:
        yield client
