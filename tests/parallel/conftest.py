"""The pool of workers, a corpus whose labels are masked unevenly, and configs of tiny models over it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter
from tests.parallel.pool import Pool

FAMILIES = {
    "neox-parallel": ["model.parallel_residual=true", "model.rotary_pct=0.5"],
    "neox-sequential": ["model.parallel_residual=false", "model.rotary_pct=0.5"],
    "gpt2-tied": ["model.position=learned", "model.tie_embeddings=true"],
    "llama": [
        *("model.num_kv_heads=2", "model.norm=rmsnorm", "model.gated_mlp=true", "model.activation=silu"),
        *("model.attention_bias=false", "model.mlp_bias=false"),
    ],
    "mamba": ["model.pattern=[mamba, attention]", "model.norm=rmsnorm"],
    "rwkv": ["model.pattern=[rwkv, attention]", "model.norm=rmsnorm", "model.embedding_norm=true"],
    "gmlp": ["model.pattern=[gmlp, attention, amlp, gmlp]", "model.amlp_size=8"],
    "experts": ["model.experts={count: 4, top_k: 2, every: 2, width: 24, gated: true}", "model.rotary_pct=0.5"],
    "balanced": [
        "model.experts={count: 4, top_k: 2, first: 1, width: 24, gated: true, router: balanced, balance_rate: 0.01, "
        "shared_width: 16, shared_gate: true, routed_scale: 1.5}",
    ],
}


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefixes of 200 documents of random bytes and of their labels: the share that is masked grows from 0 to 0.9."""
    folder, draw = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    with DatasetWriter(folder / "text", "uint16") as text, DatasetWriter(folder / "labels", "int32") as labels:
        for number in range(200):
            tokens = draw.integers(0, 256, draw.integers(20, 80))
            text.add(tokens)
            labels.add(np.where(draw.random(len(tokens)) < 0.9 * number / 200, -100, tokens))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus):
    """A function: family and overrides -> config of ten steps on 16 sequences of unevenly masked labels."""

    def config(family="neox-parallel", *overrides):
        return load_config(
            [],
            [
                *("model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.vocab_multiple=16"),
                *FAMILIES[family],
                f'data.train=[{{"path": "{corpus / "text"}", "labels": "{corpus / "labels"}"}}]',
                *("data.seq_length=16", "tokenizer.kind=bytes", "precision.compute=fp32", "optimizer.lr=0.003"),
                *("train.steps=10", "train.batch_size=16", "train.accumulation=4", "log.peak_tflops=0.1"),
                *overrides,
            ],
        )

    return config
