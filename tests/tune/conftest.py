"""The runs of the training tests."""

from tests.train.conftest import corpus, one_thread, straight, tiny  # noqa: F401
