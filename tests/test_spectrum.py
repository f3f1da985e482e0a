"""What training did to the weights: planted changes are found exactly, and an export is the change itself."""

import copy
import json
import math
import os

import pytest
import torch
from pretraining import refused
from torch import nn
from training import noise

import subspace_optim as so
from subspace_optim.cli import main
from subspace_optim.integrations.peft import save_adapter

SHAPES = ((120, 90), (90, 120), (100, 100))


def weight(shape, seed=0):
    """A matrix with a spectrum of 1/√k, as trained weights have a decaying one."""
    u, _, vh = torch.linalg.svd(noise(seed, shape), full_matrices=False)
    return (u * torch.arange(1, min(shape) + 1) ** -0.5) @ vh


def unit(seed, shape, avoid):
    """Orthonormal columns orthogonal to some others."""
    x = noise(seed, shape)
    return torch.linalg.qr(x - avoid @ (avoid.mT @ x))[0]


def report(old, new, **options):
    (row,) = so.spectral_report({"w": new}, {"w": old}, **options)
    return row


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_planted_spikes_are_found_exactly(shape, count):
    """New left directions, each an even mixture of all the old ones, larger than the whole old spectrum."""
    old = weight(shape)
    m, n = shape
    u = torch.linalg.qr(noise(1, (m, count)))[0]
    v = torch.linalg.qr(noise(2, (n, count)))[0]
    row = report(old, old + 3 * u @ v.mT)
    assert row.intruders == count and row.r90 == count
    assert row.effective_rank == pytest.approx(count, rel=1e-6)
    assert row.stable_rank == pytest.approx(count, rel=1e-6)
    assert row.intruder_share > 0.8
    assert row.change == pytest.approx(3 * math.sqrt(count) / float(old.norm()), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_of_the_same_norm_and_an_aligned_change_bring_no_intruders(shape):
    """The leading directions of W₀ survive noise that is spread over all of them."""
    old = weight(shape)
    spread = noise(3, shape)
    row = report(old, old + spread * (0.3 * old.norm() / spread.norm()), k=3)
    assert row.intruders == 0 and row.intruder_share == 0
    assert row.r90 > 0.5 * min(shape) and row.effective_rank > 0.6 * min(shape)
    u, s, vh = torch.linalg.svd(old, full_matrices=False)
    row = report(old, old + (u[:, :2] * s[:2] * 5) @ vh[:2])
    assert row.intruders == 0 and row.r90 == 2


def test_ranks_are_those_of_the_definition():
    old = weight((12, 8))
    u, v = torch.linalg.qr(noise(4, (12, 8)))[0], torch.linalg.qr(noise(5, (8, 8)))[0]
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    row = report(old, old + (u * s) @ v.mT)
    p = s[:4] ** 2 / 22
    assert row.r90 == 2  # 16 of 22 is too little, 20 is enough
    assert row.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)
    assert row.stable_rank == pytest.approx(22 / 16, rel=1e-9)


def test_the_noise_floor_is_the_best_cosine_of_a_random_direction():
    shape = (200, 150)
    basis = torch.linalg.qr(noise(6, shape))[0]
    directions = nn.functional.normalize(noise(7, (200, 2000)), dim=0)
    measured = float((basis.mT @ directions).abs().amax(0).mean())
    row = report(weight(shape), weight(shape, 1))
    assert row.noise_floor == pytest.approx(measured, rel=0.15)  # √(2 ln q / m) is the leading term of the mean
    assert row.noise_floor < 0.5 < report(weight((6, 5)), weight((6, 5), 1)).noise_floor


def test_what_did_not_change_is_all_zero():
    old = weight((9, 7))
    row = report(old, old.clone())
    assert (row.change, row.r90, row.effective_rank, row.stable_rank, row.intruders) == (0, 0, 0, 0, 0)


def test_weights_that_were_zero_had_no_direction():
    new = noise(0, (40, 3)) @ noise(1, (3, 30))
    row = report(torch.zeros(40, 30, dtype=torch.float64), new)
    assert row.intruders == 3 and row.change == math.inf
    assert row.intruder_share == pytest.approx(1, rel=1e-9)


def test_modules_and_mappings_convolutions_and_targets():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(3, 4, 3), nn.LayerNorm(8), nn.Linear(8, 6))
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight += torch.outer(torch.ones(8), torch.ones(6))
    rows = so.spectral_report(after, before.state_dict())
    assert [(row.name, row.shape) for row in rows] == [
        ("0.weight", (8, 6)),
        ("1.weight", (4, 27)),
        ("3.weight", (6, 8)),
    ]
    assert [row.r90 for row in rows] == [1, 0, 0]
    assert [row.name for row in so.spectral_report(after.state_dict(), before, target="3")] == ["3.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "spectral_report: k=0 must be"),
        ({"eps": 1.0}, "spectral_report: eps=1.0 must be in"),
        ({"reference": {}}, "the reference has no '0.weight'"),
        ({"reference": {"0.weight": torch.zeros(2, 2)}}, r"0.weight is \(8, 6\), but \(2, 2\) in the reference"),
        ({"reference": {"0.weight": torch.full((8, 6), math.nan)}}, "0.weight holds a NaN"),
        ({"target": "nope"}, "target='nope' matches no"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=message):
        so.spectral_report(model, **{"reference": model} | change)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def nudged(model, rank):
    """The same with every layer's linear weights changed by a random matrix of that rank."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for i, (name, param) in enumerate(changed.named_parameters()):
            if param.ndim == 2 and ("layers" in name or ".h." in name):
                m, n = param.shape
                param += 0.1 * (noise(2 * i, (m, rank)) @ noise(2 * i + 1, (rank, n))).float()
    return changed


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_exported_lora_is_the_change_and_peft_loads_it(make, tmp_path):
    from peft import PeftModel

    before = make().eval()
    after = nudged(before, 2).eval()
    lora = so.export_lora(after, before, rank=2)
    assert lora.left_out == [] and all(kept == pytest.approx(1, abs=1e-9) for kept in lora.kept.values())
    assert set(lora.factors) == {
        name.removesuffix(".weight")
        for name, p in after.named_parameters()
        if not torch.equal(p, before.get_parameter(name))
    }
    save_adapter(lora, tmp_path / "adapter", "somewhere/before")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        wanted, unchanged = after(input_ids=tokens).logits, before(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(before, tmp_path / "adapter")
        found = adapted(input_ids=tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, summed in another order
    assert (wanted - unchanged).abs().max() > 0.05
    merged = adapted.merge_and_unload()
    for name, param in merged.named_parameters():
        torch.testing.assert_close(param, after.get_parameter(name), rtol=0, atol=1e-6)


def test_too_small_a_rank_keeps_the_largest_part_and_the_rest_is_named():
    before = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    after = copy.deepcopy(before)
    u, v = torch.linalg.qr(noise(0, (12, 2)))[0].float(), torch.linalg.qr(noise(1, (8, 2)))[0].float()
    with torch.no_grad():
        after[0].weight += (u * torch.tensor([3.0, 4.0])) @ v.mT
        after[0].bias += 1
    lora = so.export_lora(after, before, rank=1)
    assert lora.kept == {"0": pytest.approx(16 / 25, rel=1e-5)}
    a, b = lora.factors["0"]
    torch.testing.assert_close(b @ a, 4 * torch.outer(u[:, 1], v[:, 1]), rtol=0, atol=1e-5)
    assert lora.left_out == ["0.bias"]
    assert so.export_lora(after, before, rank=9).factors["0"][0].shape == (9, 8)  # padded with zeros
    with pytest.raises(ValueError, match="rank=0 must be"):
        so.export_lora(after, before, rank=0)
    with pytest.raises(ValueError, match="no linear layer has changed"):
        save_adapter(so.export_lora(before, before, rank=1), "nowhere")


def test_the_command_prints_the_table_and_exports(tmp_path, capsys):
    from peft import PeftModel

    before = llama()
    after = nudged(before, 2)
    with torch.no_grad():
        after.model.norm.weight += 1
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    command = ["spectrum", "--before", str(tmp_path / "before"), "--after", str(tmp_path / "after")]
    export = ["--export-lora", str(tmp_path / "lora"), "--rank", "2", "--json", str(tmp_path / "report.json")]
    assert main([*command, *export]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert [row["r90"] for row in rows if "layers" in row["name"]] == pytest.approx([2] * 14, abs=1)
    assert "model.layers.0.self_attn.q_proj.weight" in shown and "14 layers at rank 2" in shown
    assert "changed, but without a place in a LoRA: model.norm.weight" in shown
    PeftModel.from_pretrained(before, tmp_path / "lora")
    assert main([*command, "--target", "q_proj"]) == 0
    assert "k_proj" not in capsys.readouterr().out
    for bad, message in (
        (["--rank", "2"], "--export-lora DIR: goes with --rank"),
        (["--target", "nope"], "matches no"),
        (["--json", str(tmp_path)], f"--json {tmp_path}: cannot be written"),
        (["--json", ""], "--json: is empty"),
        (["--export-lora", str(tmp_path / "l"), "--rank", "2", "--target", "embed_tokens"], "no linear layer that was"),
        (["--before", str(tmp_path)], f"--before {tmp_path}: is not a folder of model.save_pretrained()"),
    ):
        assert main([*command, *bad]) == 2
        assert message in capsys.readouterr().err


def test_weights_that_are_missing_or_damaged_are_no_change(tmp_path, capsys):
    """What a file lacks transformers makes up at random, which would pass for what training has done."""
    from safetensors.torch import load_file, save_file

    for name in ("before", "after"):
        llama().save_pretrained(tmp_path / name)
    file = tmp_path / "after" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    command = ["spectrum", "--before", str(tmp_path / "before"), "--after", str(tmp_path / "after")]
    refused(capsys, command, "lacks the weights of model.layers.0.mlp.up_proj.weight")
    os.truncate(file, 500)
    refused(capsys, command, "--after", "that can be read")
