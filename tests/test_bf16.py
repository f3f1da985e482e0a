"""Half precision: small updates are not lost, and the rounding is unbiased, seeded and reproducible."""

import math

import pytest
import torch
from training import FIVE, RANK, noise

import subspace_optim as so
from subspace_optim import philox

CPU = torch.device("cpu")
by_name = pytest.mark.parametrize("cls", FIVE.values(), ids=FIVE)


def run(cls, dtype, shape=(64, 64), steps=200, gradient=None, count=1, **settings):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(count)]
    opt = cls(params, **settings)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param) if gradient is None else gradient.to(dtype)
        opt.step()
    return [param.detach() for param in params]


@by_name
def test_small_updates_are_not_lost(cls):
    """D12: 200 Adam steps at lr 1e-4 bring 1.0 to 0.98 in the mean; rounding to nearest leaves it at exactly 1.0.

    Each step rounds up or down by 2⁻⁸ with odds of 0.0256: after 200 steps the standard deviation of a weight is
    2⁻⁸·√(200·0.0256) = 0.0088, and of the mean of 4096 weights 1.4e-4; allowed are five of these.
    """
    settings = {"lr": 1e-4, "rank": None, "weight_decay": 0.0}
    (weight,) = run(cls, torch.bfloat16, **settings)
    assert abs(weight.double().mean().item() - 0.98) < 7e-4
    (stalled,) = run(cls, torch.bfloat16, **settings, stochastic_rounding=False)
    assert (stalled == 1).all()


@by_name
def test_small_updates_of_projected_weights_are_not_lost(cls):
    """D12, in a subspace: the mean of a bfloat16 run follows float32, whose own step is far below half an ulp."""
    settings = {"lr": 1e-3, "rank": RANK, "weight_decay": 0.0}
    (exact,) = run(cls, torch.float32, **settings)
    (weight,) = run(cls, torch.bfloat16, **settings)
    moved = (1 - exact).mean().item()
    assert moved > 1e-3
    # Odds of moved/200/2⁻⁸ a step: the deviation of the mean of 4096 weights, as above, five times.
    bound = 5 * 2**-8 * math.sqrt(moved * 2**8 / 4096)
    assert abs(weight.double().mean().item() - exact.double().mean().item()) < bound + 1e-2 * moved
    (stalled,) = run(cls, torch.bfloat16, **settings, stochastic_rounding=False)
    assert (stalled == 1).all()


def rounded(values, seed=1, step=1):
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    philox.stochastic_round_(out, values.clone(), seed, step)
    return out


@pytest.mark.parametrize("value", [1.0 + 2**-7 * 0.3, -3.14159, 1e-3, 6.02e23, 1e-40])
def test_rounding_is_unbiased(value):
    """Up with the odds p of the remainder: the mean of n results deviates by ulp·√(p(1-p)/n), allowed five times."""
    n = 2**16
    exact = torch.full((n,), value, dtype=torch.float32)
    results = rounded(exact).double()
    low, high = results.min().item(), results.max().item()
    ulp, value = high - low, exact[0].double().item()
    assert low < value < high
    assert set(results.tolist()) == {low, high}
    p = (value - low) / ulp
    assert abs(results.mean().item() - value) < 5 * ulp * math.sqrt(p * (1 - p) / n)


def test_rounding_goes_to_a_neighbour():
    values = noise(0, (4096,)).float()
    nearest = values.bfloat16()
    ulp = 2.0 ** (torch.frexp(values.double().abs())[1].double() - 8)
    assert ((rounded(values).double() - values.double()).abs() < ulp).all()
    assert not torch.equal(rounded(values), nearest)


def test_what_is_representable_is_rounded_to_itself():
    values = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    for step in range(3):
        assert torch.equal(rounded(values.float(), step=step).view(torch.int16), values.view(torch.int16))


def test_rounding_is_reproducible_and_differs_by_seed_step_and_element():
    values = torch.full((4096,), 1.001)
    base = rounded(values)
    assert torch.equal(base, rounded(values))
    others = [rounded(values, seed=2), rounded(values, step=2), base.roll(1), base.flip(0)]
    up = (base > 1).double().mean().item()
    for other in others:
        # Independent draws agree in p² + (1-p)² of the elements, give or take five deviations.
        agree = (other == base).double().mean().item()
        expected = up**2 + (1 - up) ** 2
        assert abs(agree - expected) < 5 * math.sqrt(expected * (1 - expected) / 4096) + 0.01


@pytest.mark.parametrize("rank", [None, RANK])
@by_name
def test_a_run_is_reproducible_and_each_parameter_and_seed_rounds_for_itself(cls, rank):
    settings = {"lr": 1e-3, "rank": rank, "steps": 5, "gradient": noise(0, (64, 64)), "count": 2}
    one, two = run(cls, torch.bfloat16, **settings)
    again, _ = run(cls, torch.bfloat16, **settings)
    other, _ = run(cls, torch.bfloat16, **settings, seed=1)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert not torch.equal(one, other)


@by_name
def test_experts_of_a_stack_round_and_draw_each_for_itself(cls):
    """Of equal experts with equal gradients; noise that they share would not average out."""
    stack = torch.nn.Parameter(torch.ones(3, 16, 12, dtype=torch.bfloat16))
    opt = cls([stack], lr=5e-3, rank=2, batch_dims=1)
    for _ in range(2):
        stack.grad = torch.linspace(0.5, 1.0, 192).view(16, 12).expand(3, 16, 12).bfloat16()
        opt.step()
    assert len({tuple(expert.flatten().tolist()) for expert in stack.detach()}) == 3
    if "seed" in opt.state[stack]:
        assert len(set(opt.state[stack]["seed"].tolist())) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_dtypes_round_to_nearest(dtype):
    ends = [run(so.GaLore, dtype, lr=1e-2, rank=RANK, steps=5, stochastic_rounding=sr)[0] for sr in (True, False)]
    assert torch.equal(*ends)


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    """philox4x32-10 in the kat_vectors of Random123."""
    seed = key[1] << 32 | key[0]
    drawn = philox.philox(seed, torch.tensor([7, counter[0]]), *counter[1:])
    assert tuple(drawn[:, 1].tolist()) == words


def test_mixed_seeds_are_philox_words_and_all_different():
    low, high = philox.philox(5, torch.tensor([9]), 1)[:2, 0].tolist()
    assert philox.mix(5, 2**32 + 9) == (high << 32 | low) & (2**63 - 1)
    assert len({philox.mix(seed, stream) for seed in range(50) for stream in range(50)}) == 2500


def test_moments_of_normal_numbers():
    """n = 2¹⁸: each moment within five of its deviations √(Var/n), from the moments of N(0, 1)."""
    n = 2**18
    x = philox.normal(philox.words([3], n, CPU), (n,))[0]
    assert x.dtype == torch.float64
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert abs((x[1:] * x[:-1]).mean().item()) < 5 / math.sqrt(n)
    assert abs((x[::2] * x[1::2]).mean().item()) < 5 / math.sqrt(n / 2)  # the pairs of Box-Muller


def test_signs_are_fair_and_independent():
    n = 2**18
    x = philox.signs(philox.words([3], n, CPU), (n,))[0]
    assert set(x.tolist()) == {-1.0, 1.0}
    for shifted in (torch.ones(n), x.roll(1), x.roll(2), x.roll(4)):
        assert abs((x * shifted).mean().item()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("count", [0, 1, 3, 1024, 5000])
def test_words_are_those_of_the_counters(count):
    """Of several seeds, one of 63 bits."""
    seeds = [0, 5, 2**63 - 1]
    for seed, row in zip(seeds, philox.words(seeds, count, CPU), strict=True):
        assert torch.equal(row, philox.philox(seed, torch.arange(-(-count // 4)), 0, 0, 1).T)  # (blocks, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_numbers_do_not_depend_on_how_many_are_drawn(count):
    """A shape is filled in order, whatever its size is modulo the four words of a block."""
    for draw in (philox.normal, philox.signs):
        few, more = (draw(philox.words([1], math.prod(shape), CPU), shape) for shape in ((count,), (4, 3)))
        assert torch.equal(few[0], more.view(-1)[:count])
