"""Files of other layer kinds: genuine ones come back as they were, in their own layout and in others."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.formats.deepspeed.folder import scan, weights
from castalia.checkpoint.formats.neox.architecture import observed
from castalia.checkpoint.formats.neox.names import HEAD
from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import ExpertsConfig, MambaConfig, ModelConfig
from castalia.errors import CheckpointError
from castalia.loading import build_model
from castalia.storage.safetensors import open_safetensors
from castalia.storage.torch_file import open_pt
from tests.checkpoint.made import GLM4_MOE, MIXTRAL, SIZES, assert_same, made, written

MIXTURE = ModelConfig(**SIZES, mlp_size=64, experts=ExpertsConfig(count=4, top_k=2, every=2, width=64))


def plan(checkpoint, to, **options):
    return convert.plan_files(to, convert.prepare(checkpoint), WriteOptions(**options))


@pytest.mark.parametrize(
    "variant",
    [
        "moe-sinkhorn1-fp32",
        "moe-topk2-fp32",
        "moe-sinkhorn1-fp32-tp2",
        "gmlp-fp32",
        "amlp-fp32",
        "mamba-pp0-fp32",
        "mamba-fp16-dp2-z1",
        "hybrid-fp16-dp2-z1",
        "rwkv-fp32",
    ],
)
def test_genuine_files_come_back_from_every_layout(variant, fixtures, tmp_path):
    source = open_checkpoint(fixtures / "neox-kinds" / variant / "checkpoint" / "global_step5")
    assert source.optimizer.keys() == source.model.keys()
    back = written(source, tmp_path / "native", "native")
    tp = 2 if "sinkhorn" in variant else 1  # three experts, or layers that ranks cannot divide
    pp = 1 if {"mamba", "rwkv"} & set(source.config.model.pattern) else 2
    # On fewer data ranks a pipeline would sum over more micro-batches, and have larger moments.
    few = TargetLayout(dp=source.facts.dp, zero=int(source.facts.dp > 1))
    for number, layout in enumerate([few, TargetLayout(tp=tp, pp=pp, dp=2, zero=1), TargetLayout(pp=0)]):
        again = written(back, tmp_path / f"neox{number}", "neox", layout=layout)
        for name, ref in source.model.items():
            assert ref.dtype == again.model[name].dtype and torch.equal(ref.read(), again.model[name].read()), name
            for role in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(source.optimizer[name][role].read(), again.optimizer[name][role].read()), (
                    name,
                    role,
                )
        assert again.config.model.experts == source.config.model.experts
        assert again.config.model.layer_kinds == source.config.model.layer_kinds


def test_of_tensor_ranks_that_drifted_apart_the_first_is_taken(fixtures):
    folder = fixtures / "neox-kinds" / "moe-sinkhorn1-fp32-tp2" / "checkpoint" / "global_step5"
    source = open_checkpoint(folder)
    first, second = (open_pt(folder / f"layer_02-model_0{rank}-model_states.pt") for rank in (0, 1))
    name = "mlp.router.layer.weight"
    assert not torch.equal(first[name].read(), second[name].read())
    assert torch.equal(source.model["blocks.0.mlp.router.weight"].read(), first[name].read())
    experts = torch.cat([side["mlp.experts.mlp.w1"].read() for side in (first, second)])
    assert torch.equal(source.model["blocks.0.mlp.experts.up"].read().flatten(0, 1), experts)


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("hf", {}, "no Hugging Face class computes this model"),
        ("megatron-deepspeed", {"layout": TargetLayout(pp=1)}, "Megatron-DeepSpeed cannot hold"),
        ("neox", {"layout": TargetLayout(tp=3)}, "do not divide over tp=3"),
        ("neox", {"era": "v1"}, "the first release has no"),
    ],
)
def test_what_cannot_hold_experts_is_refused_by_name(to, options, said):
    with pytest.raises(CheckpointError) as error:
        plan(made(MIXTURE), to, **options)
    assert said in " ".join(str(error.value).split())


def test_gated_experts_have_no_place_in_the_originals_files():
    gated = MIXTURE.with_({"experts": MIXTURE.experts.with_({"gated": True})})
    with pytest.raises(CheckpointError, match=r"experts\.gated"):
        plan(made(gated), "neox")


def test_files_without_a_config_do_not_say_how_a_router_chooses(fixtures, tmp_path):
    folder = fixtures / "neox-kinds" / "moe-topk2-fp32" / "checkpoint" / "global_step5"
    for path in folder.glob("*.pt"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="how its router chooses among 3 experts"):
        open_checkpoint(tmp_path)


def test_a_native_config_says_what_the_experts_are(tmp_path):
    again = written(made(MIXTURE), tmp_path / "a", "native")
    assert_same(made(MIXTURE), replace(again, progress=made(MIXTURE).progress))


def test_a_mixtral_of_transformers_is_read_and_written_as_it_is(tmp_path):
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2, "num_local_experts": 6, "num_experts_per_tok": 3, "vocab_size": 96}
    theirs = MixtralForCausalLM(MixtralConfig(**shape, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    tokens = torch.randint(96, (2, 20))
    with torch.no_grad():
        assert torch.allclose(build_model(source)(tokens), theirs(tokens).logits, atol=1e-5)
    written(source, tmp_path / "ours", "hf")
    before, after = (open_safetensors(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[n].read(), after[n].read()) for n in before)
    assert AutoConfig.from_pretrained(tmp_path / "ours").num_local_experts == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_topk": False}, "experts.norm_topk=False (only True)"),
        ({"jitter": 0.1}, "experts.jitter=0.1 (only 0.0)"),
        ({"router": "sinkhorn"}, "experts.router=sinkhorn (only topk)"),
        ({"router": "balanced"}, "experts.router=balanced (only topk)"),
        ({"router": "balanced", "every": 2}, "experts.every=2 (only 1)"),
        ({"router": "balanced", "shared_width": 60}, "shared_width=60 (only multiples of experts.width=40)"),
        ({"router": "balanced", "shared_width": 80, "shared_gate": True}, "experts.router=balanced (only topk)"),
        ({"shared_width": 8}, "experts.shared_width=8 (only None)"),
        ({"every": 2}, "experts.every=2 (only 1)"),
    ],
)
def test_mixtures_that_no_class_computes_are_refused_with_what_they_differ_in(change, said):
    with pytest.raises(CheckpointError) as error:
        plan(made(MIXTRAL.with_({"experts": MIXTRAL.experts.with_(change)})), "hf")
    assert said in " ".join(str(error.value).split())


def test_llama_cpp_gets_no_mixtures():
    with pytest.raises(CheckpointError, match=r"nearest architecture, llama, cannot do model\.experts\. --to native"):
        plan(made(MIXTRAL), "gguf")


def test_what_moves_the_biases_of_a_router_stays_with_the_run(tmp_path):
    source = made(GLM4_MOE.with_({"experts.balance_rate": 0.01}), optimizer=False)
    assert written(source, tmp_path / "hf", "hf").config.model.experts.balance_rate == 0.01


def test_more_experts_of_a_token_than_there_are_is_refused(tmp_path):
    written(made(MIXTRAL), tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts_per_tok": 5}))
    with pytest.raises(CheckpointError, match="num_experts_per_tok=5 is more than num_local_experts=4"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(("variant", "near"), [("mamba-pp0-fp32", 1e-5), ("mamba-fp16-dp2-z1", 4e-3)])
def test_transformers_computes_genuine_mamba_and_its_folders_come_back(variant, near, fixtures, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = fixtures / "neox-kinds" / variant
    known, source = np.load(folder / "expected_logits.npz"), open_checkpoint(folder / "checkpoint" / "global_step5")
    tokens, again = torch.from_numpy(known["input_ids"]), written(source, tmp_path / "ours", "hf")
    assert again.model.keys() == source.model.keys() == again.optimizer.keys()
    for name, ref in source.model.items():
        assert ref.dtype == again.model[name].dtype and torch.equal(ref.read(), again.model[name].read()), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")  # as anybody's, without what ours add
    model = build_model(open_checkpoint(tmp_path / "theirs")).eval()
    with torch.no_grad():
        for logits in (theirs(tokens).logits, model(tokens)):
            assert np.abs(logits.float().numpy() - known["logits"]).max() < near


MAMBA = ModelConfig(**SIZES, pattern=("mamba",), norm="rmsnorm", position="none")


def test_mamba_of_other_sizes_goes_to_transformers_and_back(tmp_path):
    sizes = MambaConfig(width=96, states=8, taps=3, rank=5, conv_bias=False)
    source = made(MAMBA.with_({"mamba": sizes, "num_heads": 1, "tie_embeddings": True}))
    again = written(source, tmp_path / "hf", "hf")
    assert again.config.model.mamba == sizes
    assert_same(source, replace(again, progress=source.progress))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": ("mamba", "attention")}, "model.pattern"),
        ({"position": "learned"}, "model.position=learned"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"mamba": MambaConfig(linear_bias=True)}, "linear_bias=True"),
        ({"mamba": MambaConfig(width=40)}, "width=40"),
    ],
)
def test_mamba_that_transformers_lacks_is_refused_by_name(change, said):
    with pytest.raises(CheckpointError) as error:
        plan(made(MAMBA.with_(change)), "hf")
    assert said in " ".join(str(error.value).split())


def test_layers_of_several_tensor_ranks_are_refused(fixtures):
    for variant, kind in (("mamba-fp16-dp2-z1", "mamba"), ("gmlp-fp32", "gmlp")):
        folder = scan(fixtures / "neox-kinds" / variant / "checkpoint" / "global_step5")
        held = {name: [*refs, *refs] for name, refs in weights(folder).items()}
        with pytest.raises(CheckpointError, match=f"{kind} layers of 2 tensor ranks are 2 layers side by side"):
            observed(held, HEAD, folder, None)


def test_what_the_original_cannot_run_of_mamba_is_not_written():
    for options, said in (({"layout": TargetLayout(pp=2)}, "use pp=1"), ({"layout": TargetLayout(tp=2)}, "use tp=1")):
        with pytest.raises(CheckpointError, match=said):
            plan(made(MAMBA), "neox", **options)
    with pytest.raises(CheckpointError, match="no Mamba layers in bf16"):
        plan(made(MAMBA, dtype=torch.bfloat16), "neox")
    with pytest.raises(CheckpointError, match=r"model\.mamba\.states=8"):
        plan(made(MAMBA.with_({"mamba": MambaConfig(states=8)})), "neox")
