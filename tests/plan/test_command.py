"""`castalia plan` and `castalia doctor` as their users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.cli.plan import tokenizer_size
from castalia.config.load import load_config
from tests.checkpoint.made import FAMILIES, made, written


def castalia(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "castalia", *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_json_has_the_counts() -> None:
    plan = json.loads(castalia("plan", "gpt-neox-20b", "--gpus", "96x40GB", "--json").stdout)
    assert plan["parameters"]["total"] == 20554567680
    assert plan["parameters"]["non_embedding"] == 19934859264
    assert plan["parameters"]["as_neox_counts"] == 20556201984
    assert plan["checkpoint"]["neox_slim"] == 41112403968
    assert [stage["ranks"] for stage in plan["memory"]["stages"]] == [24] * 4
    assert plan["memory"]["fits"] is True


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "sys.argv = ['castalia', 'plan', 'neox-175b', '--gpus', '8xH100']\n"
        "from castalia.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "175,197,806,592" in done.stdout


def test_what_is_unknown_is_said_and_a_flag_fills_it_in(fixtures) -> None:
    config = [str(fixtures / "configs" / "pythia_14M.yml"), "vocab_file=own.json"]
    assert "not known: the vocabulary" in castalia("plan", *config).stdout
    assert "14,067,712" in castalia("plan", *config, "--vocab-size", "50277").stdout


def test_the_vocabulary_comes_from_the_tokenizers_file_or_kind(fixtures, tmp_path) -> None:
    sizes = ["model.num_layers=1", "model.hidden_size=8", "model.num_heads=1"]
    file = fixtures / "tokenizer" / "20B_tokenizer.json"
    config = load_config([], [*sizes, f"tokenizer.path={file}"])
    assert tokenizer_size(config) == (50277, str(file))
    assert tokenizer_size(load_config([], [*sizes, "tokenizer.kind=gpt2"]))[0] == 50257
    assert tokenizer_size(load_config([], [*sizes, "tokenizer.kind=hf"]))[0] is None
    missing = load_config([], [*sizes, "tokenizer.kind=hf", f"tokenizer.path={tmp_path / 'none.json'}"])
    assert tokenizer_size(missing)[0] is None
    both = [str(fixtures / "configs" / name) for name in ("20B.yml", "local_setup.yml")]
    size, source = tokenizer_size(load_config(both))
    assert size == 50257 and source == "that of the published gpt2-vocab.json; data/gpt2-vocab.json is not here"


def test_epochs_are_counted_from_the_index(fixtures) -> None:
    corpus = fixtures / "data" / "corpora" / "genesis_text_document"
    words = ["pythia-14m", f"data.path={corpus}", "data.split='1,0,0'", "train.steps=1", "train.batch_size=32"]
    plan = json.loads(castalia("plan", *words, "--json").stdout)
    assert plan["training"]["epochs"][str(corpus)] == pytest.approx(32 * 2048 / 50702)


def test_epochs_give_the_schedule_of_their_steps(fixtures) -> None:
    corpus = fixtures / "data" / "corpora" / "genesis_text_document"
    words = ["pythia-14m", f"data.path={corpus}", "train.epochs=20", "train.batch_size=4"]
    plan = json.loads(castalia("plan", *words, "--json").stdout)["training"]
    assert plan["steps"] > 50 and plan["decay_end"] and plan["first_lr"] < plan["peak_lr"]


def test_blocks_that_are_computed_again_are_counted_by_stage() -> None:
    words = ["plan", "pythia-410m", "train.micro_batch_size=4", "train.recompute=auto"]
    said = " ".join(castalia(*words, "--gpus", "12GB").stdout.split())
    assert "by operations for the bytes they free): 15 of 24 blocks" in said and "fits: 10.00 GiB needed" in said
    assert "train.recompute=auto: no block is computed again" in " ".join(castalia(*words).stdout.split())
    words += ["parallel.pp=2", "train.batch_size=64", "--gpus", "2x12GB"]
    found = json.loads(castalia(*words, "--json").stdout)["memory"]
    assert [count for _, count in (stage["dense"] for stage in found["computed_again"])] == [14, 10]
    assert "of stage 0;" in " ".join(castalia(*words).stdout.split())
    assert found["fits"] and found["by_recompute"]["full"] < found["by_recompute"]["auto"] == found["largest"]


def test_suggestions_name_what_binds() -> None:
    done = castalia("plan", "gpt-neox-20b", "--gpus", "96x40GB", "--suggest")
    assert "does not fit" in done.stdout and "slower" in done.stdout
    assert "add --gpus" in castalia("plan", "pythia-14m", "--suggest", code=2).stderr
    assert "on 16 of them some do" in castalia("plan", "gpt-neox-20b", "--gpus", "8x40GB").stdout


def test_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    castalia("plan", "pythia-410m", "--gpus", "8xA100", "--plot", str(picture))
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_doctor_explains_each_missing_path() -> None:
    found = json.loads(castalia("doctor", "--json").stdout)
    assert found["machine"]["cores"] >= 1
    text = " ".join(castalia("doctor").stdout.split())
    for path in found["fast_paths"]:
        assert path["name"] in text
        assert (f"missing: {path['name']}: {path['cost']}" in text) != path["available"]


def test_what_a_config_of_a_model_larger_than_memory_would_read() -> None:
    words = ["plan", "gpt-neox-20b", "--vocab-size", "50257", "--generate", "--memory", "8GB"]
    found = json.loads(castalia(*words, "--json").stdout)
    assert found["disk_bytes_per_second"] == [5e8, 2e9, 7e9]
    row = found["plans"][0]
    assert row["bytes_per_pass"] == 2 * ((44 - row["resident_blocks"]) * 453_064_704 + 50432 * 6144)
    assert row["seconds_per_pass"] == [row["bytes_per_pass"] / rate for rate in (5e8, 2e9, 7e9)]
    assert "too little" in castalia(*words[:-1], "2GB", code=2).stderr


def test_what_a_checkpoint_larger_than_memory_reads(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox"]), tmp_path / "model", "native")
    for purpose in ("--generate", "--eval"):
        plan = json.loads(castalia("plan", str(tmp_path / "model"), purpose, "--memory", "1GB", "--json").stdout)
        assert [row["wanted"] for row in plan["plans"]] == [1, 16, 256]
        assert all(row["resident_blocks"] == 2 and row["bytes_per_pass"] == 0 for row in plan["plans"])
        assert "2 blocks of" in castalia("plan", str(tmp_path / "model"), purpose, "--memory", "1GB").stdout
    for words in (["--memory", "1GB"], ["--generate", "--eval"], ["--generate", "--memory", "99MB"]):
        assert castalia("plan", str(tmp_path / "model"), *words, code=2).stderr.startswith("error: ")


def test_a_neox_config_without_a_tokenizer_is_planned_with_neox_default(tmp_path: Path) -> None:
    keys = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "log_dir": "x", "num_workers": 1}
    (tmp_path / "neox.yml").write_text(json.dumps(keys | {"steps_per_print": 3, "gradient_clipping": 1.0}))
    said = " ".join(castalia("plan", str(tmp_path / "neox.yml")).stdout.split())
    assert "assumed: vocabulary 50,257: GPT-NeoX's default, GPT2BPETokenizer, as the config names no tokenizer" in said
    assert "note: 3 keys without effect (castalia config check lists them)" in said
    assert "not given: no end, no data, no batch, no vocabulary, no folder (castalia config check" in said
    (tmp_path / "ours.yml").write_text("model: {num_layers: 1, hidden_size: 8, num_heads: 1}")
    assert "not known: the vocabulary" in castalia("plan", str(tmp_path / "ours.yml")).stdout
