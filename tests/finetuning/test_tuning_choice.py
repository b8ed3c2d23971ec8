"""Settings from the sizes of data, model and machine; what is given otherwise decides the rest."""

from __future__ import annotations

import numpy as np
import pytest

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.finetuning.tuning_choice import Sizes, choose, num_samples, sizes_of

MODEL = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, vocab_size=512, max_positions=256)
FREE = 8 << 30


def chosen(documents, *words, held_out=10, labels=True, kind="LoRA", memory=FREE):
    sizes = Sizes(np.array(documents), held_out, labels, int(np.sum(documents)))
    config = load_config([{"finetune": {"lora": {}}} if kind == "LoRA" else {}], words, any_batch=True)
    values = choose(config, MODEL, sizes, memory, "cpu", "fp32", kind)
    return {path.rpartition(".")[2]: value for path, (value, _) in values.items()}, values


def test_the_rate_follows_what_trains():
    pairs = ["train.objective=dpo", "data.packing=unpacked"]
    rates = [chosen([50] * 100, *words, kind=kind)[0]["lr"] for words in ([], pairs) for kind in ("full", "LoRA")]
    assert rates == [2e-5, 2e-4, 1e-6, 1e-5]


def test_the_length_is_that_of_the_longest_and_cuts_are_counted():
    assert chosen([50, 100, 30])[0]["seq_length"] == 99
    length, why = chosen([50, 300, 400, 30] * 5)[1]["data.seq_length"]
    assert length == 256 and "10 of 20 are longer and cut there, the longest has 399" in why
    assert "data.allow_chopped=false" in why
    why = chosen([50, 300, 400, 30] * 5, "data.allow_chopped=false")[1]["data.seq_length"][1]
    assert "10 of 20 are longer and left out, the longest has 399" in why and "allow_chopped" not in why


def test_short_documents_share_samples():
    documents = [20] * 90 + [200]
    few, values = chosen(documents)
    assert (
        few["packing"] == "pack_until_overflow" and few["mask_documents"] and "9.1 times" in values["data.packing"][1]
    )
    samples = num_samples(sizes_of([np.array(documents)], 0, True), 199, "pack_until_overflow")
    assert samples == 10  # ten documents of 20 in 200 places, then the long one
    assert few["batch_size"] == 1 and few["steps"] == 30  # about eight documents a step
    assert chosen([100] * 90)[0]["packing"] == "unpacked"
    judged = chosen(documents, "train.objective=dpo", "data.packing=unpacked")[0]
    assert judged["packing"] == "unpacked"


def test_processes_take_equal_parts_of_a_batch():
    sizes = Sizes(np.array([100] * 7), 0, True, 700)
    for objective, batch in (("causal", 6), ("kto", 4)):
        config = load_config([{}], [f"train.objective={objective}", "data.packing=unpacked"], any_batch=True)
        values = choose(config, MODEL, sizes, FREE, "cpu", "fp32", "full", processes=2)
        assert values["train.batch_size"][0] == batch


@pytest.mark.parametrize(("number", "batch", "epochs"), [(6, 6, 3), (400, 8, 3), (3200, 32, 3), (20_000, 32, 2)])
def test_few_data_make_a_small_batch_and_many_passes(number, batch, epochs):
    found = chosen([100] * number)[0]
    assert found["batch_size"] == batch and found["steps"] == -(-epochs * number // batch)


def test_what_is_given_decides_the_rest():
    found = chosen([100] * 400, "train.batch_size=16")[0]
    assert found["steps"] == 75
    assert chosen([100] * 400, "train.steps=50")[0]["every"] == 5
    asked = chosen([100] * 400, "train.epochs=7")[1]["train.steps"]
    assert asked == (350, "for 7 passes, as you asked")
    assert "warmup" in found and chosen([100] * 400, "train.steps=9")[0]["warmup"] == 0.0


def test_memory_bounds_what_goes_through_at_once():
    roomy = chosen([250] * 400)[0]
    tight, values = chosen([250] * 400, memory=30 << 20)
    assert "micro_batch_size" not in roomy and tight["batch_size"] % tight["micro_batch_size"] == 0
    assert tight["micro_batch_size"] < 8 and "GiB" in values["train.micro_batch_size"][1]
    judged = chosen([250] * 400, "train.objective=kto", "data.packing=unpacked", memory=1 << 20)[0]
    assert judged["micro_batch_size"] == 2  # which KTO compares with each other


def test_a_run_is_judged_where_something_is_held_out():
    assert {"every", "batches", "patience"} <= chosen([100] * 400)[0].keys()
    assert "patience" not in chosen([100] * 40, held_out=2)[0]
    assert not {"every", "batches"} & chosen([100] * 10, held_out=0)[0].keys()
