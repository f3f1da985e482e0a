"""The planner: what it predicts is what torch's allocator then counts, and what it proposes fits."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import subspace_optim as so
from subspace_optim import allocation
from subspace_optim.planner import CATEGORIES, bytes_of, causal_loss, enable_checkpointing, tracing
from subspace_optim.pretrain.machine import peak_bytes
from subspace_optim.sizes import SIZES, llama_options

OPTIMIZERS = ("adamw", *so.OPTIMIZERS)


def llama(size="tiny", dtype=torch.float32, device="cpu"):
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**llama_options(SIZES[size]))).to(dtype).train()


def small(layers=2, **changes):
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2}
    return LlamaConfig(**shape | changes, num_hidden_layers=layers, use_cache=False)


def measured(model, name, batch, seq, accumulation=1, layerwise="off", **options):
    """Bytes at the peak of a step from which all state is there: what was there, and what the allocator added."""
    optimizer = so.create(model, name, **options)
    optimizer.allocate_state()
    if layerwise != "off":
        so.project_in_backward(model, optimizer, linear=layerwise == "linear", early=True)
    there = sum(t.untyped_storage().nbytes() for t in itertools.chain(model.parameters(), model.buffers()))

    def step():
        for _ in range(accumulation):
            causal_loss(model, batch, seq).backward()
        optimizer.step()

    return there + optimizer.state_bytes() + peak_bytes(step)


@pytest.mark.parametrize(
    ("size", "batch", "seq", "accumulation", "dtype", "checkpointing"),
    [
        ("tiny", 8, 128, 1, torch.float32, False),
        ("tiny", 2, 32, 2, torch.bfloat16, True),
        ("20m", 1, 32, 2, torch.float32, False),  # the step is the peak
    ],
)
def test_the_peak_is_what_the_allocator_counts(size, batch, seq, accumulation, dtype, checkpointing):
    """Within 5 %, which is the promise; it is 1 to 2 here, the rest being what kernels allocate inside an op."""
    model = llama(size, dtype)
    plan = so.plan(model, batch=batch, seq=seq, accumulation=accumulation, checkpointing=checkpointing, rank=64)
    if checkpointing:
        enable_checkpointing(model)
    assert plan.peak == pytest.approx(measured(model, "galore", batch, seq, accumulation, rank=64), rel=0.05)


@pytest.mark.parametrize(
    ("layerwise", "options"),
    [
        ("off", {"state_bits": 8, "basis_bits": 4}),
        ("hooks", {}),
        ("linear", {"proj_type": "right"}),
        ("hooks", {"state_bits": 8, "basis_bits": 8, "dtype": torch.bfloat16}),
        ("off", {"rounding": "kahan", "dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_the_peak_under_codecs_and_projected_gradients(layerwise, options):
    """5 % again."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    model = LlamaForCausalLM(small()).to(dtype)
    plan = so.plan(model, batch=2, seq=16, accumulation=2, rank=16, layerwise=layerwise, **options)
    found = measured(model, "galore", 2, 16, 2, layerwise=layerwise, rank=16, **options)
    assert plan.peak == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(("name", "copies"), [("galore", False), ("flora", False), ("gradnormlorp", True)])
def test_kahan_copies_no_parameter_where_its_kernel_compensates(name, copies):
    """As kernels of a GPU do, but for a rule that turns the weights itself; on a CPU a float32 copy is there.

    GradNormLoRP without one has R of a whole bucket on a CPU, which takes as much.
    """
    model = LlamaForCausalLM(small(hidden_size=256)).bfloat16()
    largest = 4 * max(p.numel() for p in model.parameters())
    more = {}
    for device in ("cpu", "cuda"):
        plans = (so.plan(model, name, seq=8, rank=8, device=device, rounding=r) for r in ("kahan", "nearest"))
        kahan, nearest = (plan.phases["step"] - plan.phases["start"] for plan in plans)
        more[device] = kahan - nearest
    assert copies or more["cpu"] > largest / 2
    assert (more["cuda"] == 0) != copies


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_the_optimizer_allocates(name):
    """Exactly: the real optimizer makes it, on tensors without memory."""
    model = LlamaForCausalLM(small())
    rank = {} if name in ("adamw", "grams") else {"rank": 16}
    plan = so.plan(model, name, seq=16, **rank)
    optimizer = so.create(model, name, **rank)
    optimizer.allocate_state()
    tensors = {
        key: sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and test(k))
        for key, test in (("basis", lambda k: k[:5] == "basis"), ("moments", lambda k: k[:5] != "basis"))
    }
    assert {key: plan.bytes[key] for key in tensors} == tensors
    assert plan.bytes["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert plan.parameters == sum(p.numel() for p in model.parameters())


def whole_and_folded(monkeypatch, config, **options):
    """The plan with every layer run, and as it is made."""
    folded = so.plan(config, batch=2, seq=16, **options)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "stacks_of", lambda *_: [])
        return so.plan(config, batch=2, seq=16, **options), folded


@pytest.mark.parametrize(
    "options",
    [
        {"checkpointing": True, "device": "cuda", "state_bits": 8},
        {"layerwise": "linear", "accumulation": 2, "basis_bits": 4, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_layers_that_are_alike_are_run_once(monkeypatch, options):
    """Every byte of every layer, category and phase is as when all of them run."""
    config = small(layers=5, tie_word_embeddings=True)
    ran = set()
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *a, **k: ran.add(self) or forward(self, *a, **k))
    whole, folded = whole_and_folded(monkeypatch, config, rank=8, **options)
    assert len(ran) == 5 + 4
    assert folded == whole


def test_layers_that_differ_are_all_run(monkeypatch):
    """By their shapes, by a setting, by what the optimizer does with them, or by what they turn out to take."""
    width = iter((16, 16, 32, 16, 16, 16))
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, n := next(width)), nn.Linear(n, 16)) for _ in range(6)))
    dropped = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5 * (i == 2))) for i in range(6)))
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6)))

    class Grows(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

        def forward(self, x):
            Grows.calls += 1
            return torch.cat([x @ self.weight, x.new_zeros(Grows.calls, 16)])

    grows = nn.Sequential(*(Grows() for _ in range(6)))

    def loss(model, batch, seq):
        Grows.calls = 0
        return model(torch.zeros(batch, 16)).square().mean()

    for model, target in ((layers, None), (dropped, None), (plain, ["2.0"]), (grows, ["weight"])):
        whole, folded = whole_and_folded(monkeypatch, model, rank=4, target=target, loss=loss)
        assert folded == whole


def test_the_model_is_not_touched():
    model = LlamaForCausalLM(small())
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    so.plan(model, batch=2, seq=16, rank=16, checkpointing=True, dtype="bfloat16")
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not getattr(model, "is_gradient_checkpointing", False)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        elsewhere = so.plan("tiny", "galore", batch=1, seq=16)
    assert elsewhere.bytes == so.plan("tiny", "galore", batch=1, seq=16).bytes


def test_categories_and_layers_add_up():
    plan = so.plan(small(), batch=2, seq=16, rank=16, accumulation=2)
    assert tuple(plan.bytes) == CATEGORIES and plan.peak == plan.allocated == sum(plan.bytes.values())
    for category, count in plan.bytes.items():
        assert sum(held.get(category, 0) for held in plan.layers.values()) == count
    layer = plan.layers["model.layers.0"]
    assert layer["weights"] == 4 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64)
    assert layer["moments"] + layer["basis"] > 0
    assert plan.peak == max(plan.phases.values()) == plan.phases[plan.phase]


def test_a_gradient_of_two_micro_batches_lives_through_the_second():
    one, two = (so.plan(small(), batch=8, seq=64, rank=16, accumulation=n) for n in (1, 2))
    weights = sum(p.nbytes for p in LlamaForCausalLM(small()).parameters())
    assert one.phase == two.phase == "backward"
    assert two.phases["forward"] - one.phases["forward"] == weights


def test_tied_weights_count_once():
    model = LlamaForCausalLM(small(tie_word_embeddings=True))
    plan = so.plan(model, seq=8, rank=16)
    assert plan.bytes["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_a_module_may_hold_tensors_that_are_neither_weights_nor_buffers():
    """As the rotary embeddings of older transformers do."""
    model = nn.Sequential(nn.Linear(16, 16))
    plain = so.plan(model, rank=4, loss=lambda m, batch, _: (m(torch.zeros(batch, 16)) * torch.ones(16)).sum())
    model.masks, model.scale = [torch.ones(16)], model[0].weight.detach()[0]
    held = so.plan(model, rank=4, loss=lambda m, batch, _: (m(torch.zeros(batch, 16)) * m.masks[0]).sum())
    assert held.bytes["weights"] == plain.bytes["weights"]


def test_any_module_with_its_own_loss():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 64), nn.GELU(), nn.Linear(64, 8))
    plan = so.plan(model, rank=4, batch=32, loss=lambda m, batch, _: m(torch.zeros(batch, 3, 8, 8)).square().mean())
    assert plan.bytes["activations"] >= 4 * 32 * (8 * 36 + 64 + 64) and set(plan.layers) >= {"0", "2", "4"}
    with pytest.raises(ValueError, match="checkpointing"):
        so.plan(model, rank=4, checkpointing=True)


def test_a_gpu_adds_its_margin():
    plain, gpu = so.plan(small(), seq=16, rank=16), so.plan(small(), seq=16, rank=16, gpu="1GB")
    assert gpu.fits and gpu.settings["device"] == "cuda" and gpu.bytes["margin"] > 1 << 29
    assert plain.allocated < gpu.allocated < 1.2 * plain.allocated  # every tensor fills up its last 512 bytes


def test_what_does_not_fit_is_changed_from_the_cheapest_on():
    def planned(capacity, keep=()):
        keep = ("state_bits", "basis_bits", "layerwise", *keep)
        return so.plan(small(), batch=8, seq=64, rank=16, gpu=capacity, device="cpu", keep=keep)

    full = planned("1GB")
    assert full.fits and not full.changes
    close = planned(full.peak - 1)
    assert not close.fits and close.changes == {"checkpointing": True} and close.fitting.fits
    tight = planned("3MB")
    assert tight.fitting.peak <= 3_000_000 < tight.peak
    assert {"batch", "accumulation"} <= set(tight.changes)
    changed = tight.fitting.settings
    assert changed["batch"] * changed["accumulation"] == 8
    same = {key: changed[key] for key in ("rank", "dtype", "batch", "accumulation", "checkpointing")}
    same["embedding_rank"] = changed.get("embedding_rank")
    assert so.plan(small(), seq=64, **same).peak == tight.fitting.peak
    assert "dtype" not in planned("3MB", keep=["dtype"]).changes
    hopeless = planned("300kB")
    assert not hopeless.fits and hopeless.fitting is None and hopeless.least > 300_000
    assert "the least is" in hopeless.verdict()


def test_a_plan_is_said_and_saved(tmp_path):
    plan = so.plan(small(), "galore", batch=2, seq=16, rank=16, gpu="0.5GiB")
    assert "does not fit" in plan.table() and "2 × model.layers.*" in plan.table() and "margin" in plan.table()
    plan.save(tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["peak"] == plan.peak and found["bytes"] == dict(plan.bytes) and found["settings"]["rank"] == 16


@pytest.mark.parametrize(
    ("capacity", "options"),
    [("20GB", {"batch": 8, "basis_bits": 8}), ("16GB", {"rank": 64, "embedding_rank": 192, "basis_bits": 4})],
)
def test_a_7b_is_made_to_fit_with_little_state(capacity, options):
    """Issue 4.5: at most 2 % of the bytes of fp32 AdamW's state, which is two floats a parameter."""
    options |= {"accumulation": 64, "checkpointing": True, "layerwise": "hooks", "dtype": "bfloat16", "state_bits": 8}
    found = so.plan("7b", gpu=capacity, keep=["batch"], **options)
    plan = found.fitting or found
    assert plan.peak <= bytes_of(capacity) and plan.settings["state_bits"] == 8
    assert plan.bytes["moments"] + plan.bytes["basis"] <= 0.02 * 8 * plan.parameters
    if capacity == "20GB":
        chosen = {"rank": 256, "basis_bits": 4, "embedding_rank": 768, "batch": 8}
        assert {key: plan.settings[key] for key in chosen} == chosen
        assert plan.ranks["lm_head"] == plan.ranks["model.embed_tokens"] == (768,)
        assert "rank 768" in plan.table() and "rank 256" in plan.table()


@pytest.mark.parametrize(("name", "most"), [("galore", 0.02), ("gradnormlorp", 0.105)])
def test_what_8_bits_leave_of_the_state_of_a_7b(name, most):
    """GradNormLoRP's paper has -89.5 % of the optimizer's memory at 8 bits."""
    bits = {"state_bits": 8, "basis_bits": 4} if name == "galore" else {"state_bits": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**llama_options(SIZES["7b"])))
    optimizer = so.create(model, name, rank=256, embedding_rank=768 if name == "galore" else None, **bits)
    optimizer.allocate_state()
    assert optimizer.state_bytes() <= most * 8 * sum(p.numel() for p in model.parameters())


# ---- a budget -------------------------------------------------------------------------------------------------------


def test_a_budget_becomes_groups_whose_state_is_what_was_planned():
    model = LlamaForCausalLM(small())
    budget = 300_000
    plan = so.plan(model, seq=16, budget=budget, ranks=(2, 4, 8, 16))
    optimizer = so.GaLore(plan.param_groups(model), lr=1e-2)
    optimizer.allocate_state()
    planned = plan.bytes["moments"] + plan.bytes["basis"]
    assert optimizer.state_bytes() == planned <= budget
    chosen = [p for name, p in model.named_parameters() if name in plan.choices]
    own = sum(t.nbytes for p in chosen for t in optimizer.state[p].values() if torch.is_tensor(t))
    assert own == sum(choice.nbytes for choice in plan.choices.values())
    causal_loss(model, 2, 16).backward()
    optimizer.step()
    assert "rank" in plan.table()
    with pytest.raises(ValueError, match="another model"):
        plan.param_groups(LlamaForCausalLM(small(num_key_value_heads=1)).model)
    with pytest.raises(ValueError, match="without budget"):
        so.plan(model, seq=16, rank=4).param_groups(model)


def test_more_budget_never_loses_more():
    model = llama("tiny", device="meta")
    lost = []
    groups = so.param_groups(model, 1)
    for mib in (5, 10, 20, 41):
        chosen = allocation.choose(groups, so.GaLore, mib << 20)
        lost.append(sum(choice.lost for choice in chosen.values()))
    assert lost == sorted(lost, reverse=True) and lost[-1] == 0


def test_a_probe_gives_rank_to_what_needs_it():
    """One matrix has a gradient of rank one, the other a flat spectrum: the budget goes to the other."""
    model = nn.ModuleDict({"one": nn.Linear(32, 32, bias=False), "flat": nn.Linear(32, 32, bias=False)})

    def probe(model):
        (model["one"](torch.ones(4, 32)).sum() + (model["flat"].weight * torch.eye(32)).sum()).backward()

    def loss(model, batch, seq):
        return model["flat"](model["one"](torch.zeros(batch, 32))).sum()

    plan = so.plan(model, budget=6000, probe=probe, ranks=(2, 16), loss=loss)
    one, flat = (plan.choices[f"{name}.weight"] for name in ("one", "flat"))
    assert one.options["rank"] == 2 and flat.options["rank"] != 2 and flat.nbytes > 2 * one.nbytes
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"one\.weight"):
        so.plan(model, budget="1MB", probe=lambda model: None, loss=loss)


def test_a_budget_below_the_least_names_it():
    model = LlamaForCausalLM(small())
    with pytest.raises(ValueError, match="the least") as refused:
        so.plan(model, seq=16, budget="50kB")
    least = int(str(refused.value).split("can take is ")[1].split()[0])
    assert so.plan(model, seq=16, budget=least).bytes["moments"] > 0
    with pytest.raises(ValueError, match="the least"):
        so.plan(model, seq=16, budget=least - 1)


table = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n, max_size=n), st.lists(st.integers(1, 1000), min_size=n, max_size=n)
    )
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(table, st.integers(1, 2)), min_size=1, max_size=3), st.floats(0, 1))
def test_the_integer_program_is_as_good_as_trying_everything(classes, share):
    costs, sizes = [c for (c, _), _ in classes], [s for (_, s), _ in classes]
    counts = [count for _, count in classes]
    members = [i for i, count in enumerate(counts) for _ in range(count)]
    least, most = (sum(extreme(sizes[i]) for i in members) for extreme in (min, max))
    budget = least + int(share * (most - least))
    taken = allocation.solve(costs, sizes, counts, budget)
    assert [sum(row) for row in taken] == counts
    assert sum(k * s for row, size in zip(taken, sizes) for k, s in zip(row, size)) <= budget

    def total(table, picks):
        return sum(table[i][j] for i, j in zip(members, picks))

    every = itertools.product(*(range(len(costs[i])) for i in members))
    best = min(total(costs, picks) for picks in every if total(sizes, picks) <= budget)
    found = sum(k * c for row, cost in zip(taken, costs) for k, c in zip(row, cost))
    # HiGHS accepts an answer within 1e-6 of the best, and treats costs below its tolerance of 1e-7 as nothing.
    assert found == pytest.approx(best, rel=1e-5, abs=1e-5 * max(max(cost) for cost in costs))


def test_energies_fall_off_and_end_at_nothing():
    lost = allocation.energy_lost(None, 8)
    assert lost[0] == 1 and lost[-1] == pytest.approx(0, abs=1e-15) and lost == sorted(lost, reverse=True)
    assert allocation.energy_lost(torch.tensor([1.0, 2.0]), 2) == pytest.approx([1, 0.2, 0])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, ("batch=0",)),
        ({"accumulation": 1.5}, ("accumulation=1.5",)),
        ({"gpu": "24 parsecs"}, ("gpu='24 parsecs'", "24GB")),
        ({"gpu": "-3GB"}, ("gpu=",)),
        ({"gpu": 0}, ("gpu=0",)),
        ({"device": "tpu"}, ("device='tpu'",)),
        ({"dtype": "int8"}, ("dtype='int8'", "bfloat16")),
        ({"dtype": "bf16"}, ("dtype='bf16'",)),
        ({"optimizer": "galor"}, ("galore",)),
        ({"budget": "1GB", "rank": 4}, ("rank", "leave")),
        ({"budget": "none"}, ("budget='none'",)),
        ({"budget": "1GB", "optimizer": "adamw"}, ("budget='1GB'", "projects nothing", "leave it out")),
        ({"budget": "1GB", "ranks": (0,)}, ("rank",)),
        ({"rank": 0}, ("rank=0",)),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(ValueError) as refused:
        so.plan(small(), **{"seq": 8, **options})
    assert all(word in str(refused.value) for word in words), refused.value


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="did you mean 60m"):
        so.plan("60mm")
    with pytest.raises(TypeError, match="a size or a config"):
        so.plan(3)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="subspace-optim\\[plan\\]"):
        allocation.solve([[1.0]], [[1]], [1], 1)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="subspace-optim\\[cli\\]"):
        so.plan("tiny")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24e9),
        ("22.5 GiB", 22.5 * 2**30),
        ("1e3MB", 1e9),
        ("7", 7),
        (1024, 1024),
        ("512mib", 2**29),
        ("3kB", 3e3),
    ],
)
def test_sizes_are_read(text, count):
    assert bytes_of(text) == int(count) and math.isfinite(count)


# ---- the engine's part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_allocated_early_steps_the_same(name):
    """And a state that is there is kept."""
    ends = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8))
        optimizer = so.create(model, name, lr=0.1, **({} if name in ("adamw", "grams") else {"rank": 2}))
        for _ in range(3):
            if early:
                optimizer.allocate_state()
            model(torch.randn(4, 12)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
