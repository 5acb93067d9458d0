"""One token's attention in a cache of fixed size: the kernels against the definition."""

from dataclasses import replace

import pytest
import torch

from minijamba import fused_attention
from minijamba.attention import _naive, _rates, rotate
from minijamba.cache import _pack
from minijamba.fused_attention import attend, place
from minijamba.model import Jamba
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# batch, heads, groups, width of a head, slots
SIZES = [(2, 4, 2, 16, 300), (1, 4, 4, 24, 700), (3, 8, 1, 128, 70), (2, 20, 1, 16, 70)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("batch, heads, groups, size, slots", SIZES)
@pytest.mark.parametrize("theta", [None, 1e4])
def test_a_token_takes_its_place(batch, heads, groups, size, slots, theta):
    q, k, v = normal(batch, heads, size), normal(batch, groups, size, seed=1), normal(batch, groups, size, seed=2)
    before = normal(2, batch, slots, groups, size, seed=3)
    positions = torch.tensor([slots - 1, 3, 17][:batch], device=DEVICE)
    rates = None if theta is None else _rates(theta, size // 2, torch.float32, torch.device(DEVICE))

    def check(positions):
        def turn(heads):
            return heads if theta is None else rotate(heads[:, None], positions[:, None], theta)[:, 0]

        expected = before.clone()
        expected[0, torch.arange(batch), positions] = turn(k)
        expected[1, torch.arange(batch), positions] = v
        actual = before.clone()
        turned = place(q, k, v, actual[0], actual[1], positions=own, rates=rates)
        # Angles reach hundreds of turns, of which float32 keeps five digits.
        assert_matches({"queries": turned, "cache": actual}, {"queries": turn(q), "cache": expected}, 3e-5, "placed")

    own = positions
    check(positions)
    assert_rejects(check, positions - 1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("batch, heads, groups, size, slots", SIZES)
def test_attends_to_the_slots_in_use(batch, heads, groups, size, slots, window, dtype):
    """Each row has its own number of them; what lies behind is NaN, as memory that was never written may be."""
    q, keys, values = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(
        [(batch, heads, size), (batch, slots, groups, size), (batch, slots, groups, size)]
    ))  # fmt: skip
    ends = torch.tensor([slots, 1, 40][:batch], device=DEVICE)
    place_of = torch.arange(slots, device=DEVICE)
    for cached in (keys, values):
        cached[place_of >= ends[:, None]] = torch.nan

    def check(last):
        visible = place_of < last[:, None, None]
        if window is not None:
            visible = visible & (place_of >= last[:, None, None] - window)
        wide = (torch.nan_to_num(tensor.double()) for tensor in (q[:, None], keys, values))
        expected = _naive(*wide, visible)[:, 0]
        assert_matches(attend(q, keys, values, ends=ends, window=window), expected, TOLERANCES[dtype], "attention")

    check(ends)
    if slots > 1:
        assert_rejects(check, (ends - 1).clamp(min=1) + (ends == 1))


def test_many_programs_share_the_slots(monkeypatch):
    """With parts of one block each, and with one part for all."""
    q, keys, values = normal(1, 2, 16), normal(1, 4000, 1, 16, seed=1), normal(1, 4000, 1, 16, seed=2)
    ends = torch.tensor([3999], device=DEVICE)
    expected = _naive(q[:, None].double(), keys[:, :3999].double(), values[:, :3999].double(), None)[:, 0]
    for programs in (1, 7, 264):
        monkeypatch.setitem(fused_attention.TILES, 4, (programs, 4, 3))
        assert_matches(attend(q, keys, values, ends=ends), expected, 3e-6, f"{programs} programs")


@pytest.mark.parametrize("batch, heads, groups, size, slots", SIZES)
def test_keys_and_values_of_eight_bits(batch, heads, groups, size, slots):
    """Packed as the cache packs them, and attended to as if they were unpacked first."""
    positions = torch.tensor([slots - 1, 3, 17][:batch], device=DEVICE)
    q, k, v = normal(batch, heads, size), normal(batch, groups, size, seed=1), normal(batch, groups, size, seed=2)
    before = normal(2, batch, slots, groups, size, seed=3)
    packed = [_pack(cached) for cached in before]

    def check(k):
        caches = [tensor.clone() for tensor in (packed[0][0], packed[1][0], packed[0][1], packed[1][1])]
        place(q, own, v, *caches, positions=positions)
        expected = before.clone()
        expected[0, torch.arange(batch), positions] = k
        expected[1, torch.arange(batch), positions] = v
        numbers, scales = zip(*(_pack(cached) for cached in expected), strict=True)
        assert_matches(caches, [*numbers, *scales], 1e-6, "cache")
        visible = torch.arange(slots, device=DEVICE) <= positions[:, None, None]
        unpacked = (part.double() * scale.double()[..., None] for part, scale in zip(numbers, scales, strict=True))
        y = _naive(q[:, None].double(), *unpacked, visible)[:, 0]
        assert_matches(attend(q, *caches, ends=positions + 1), y, 3e-6, "attention")

    own = k
    check(k)
    assert_rejects(check, k.roll(1, -1))


def test_eight_bits_are_the_nearest():
    heads = torch.tensor([[[[127.0, 0.5, 1.5, -2.5, -126.4, 3.0]]]], device=DEVICE)

    def check(expected):
        numbers, scales = _pack(heads)
        assert_matches([numbers, scales], [expected, [[[1.0]]]], 0, "packed")
        caches = [torch.zeros(1, 1, 1, 6, dtype=torch.int8, device=DEVICE) for _ in range(2)]
        scales = [torch.zeros(1, 1, 1, device=DEVICE) for _ in range(2)]
        place(heads[0], heads[0], heads[0], *caches, *scales, positions=torch.zeros(1, dtype=torch.long, device=DEVICE))
        assert_matches(caches[0], expected, 0, "kernel")

    check([[[[127, 0, 2, -2, -126, 3]]]])
    assert_rejects(check, [[[[127, 0, 1, -2, -126, 3]]]])


@torch.no_grad()
@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("window", [None, 6])
def test_a_whole_model_with_a_fixed_cache(hybrid, kv, window):
    """Rows of different lengths, 20 query heads for a key head, positions: step by step as without kernels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 80, "num_attention_heads": 20, "num_key_value_heads": 1, "sliding_window": window}
    model = Jamba(replace(hybrid, rope_theta=1e4, **sizes)).to(DEVICE).eval()
    tokens = torch.randint(41, (2, 12), device=DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1, 5:] = False

    def run(rung, tokens=tokens):
        cache = model.new_cache(2, capacity=16, kv=kv)
        model(tokens[:, :9], cache=cache, mask=mask)
        cache.fix(16)
        with use_rung(rung):
            return torch.cat([model(token[:, None], cache=cache) for token in tokens[:, 9:].unbind(1)], 1)

    by_kernels = run("fused")

    def check(expected):
        assert_matches(by_kernels, expected, 2e-5 if kv is None else 2e-3, "logits")

    check(run("parallel"))
    assert_rejects(check, run("parallel", tokens.roll(1, 1)))


def test_with_gradients_a_fixed_cache_runs_without_the_kernel(hybrid):
    model = Jamba(hybrid).to(DEVICE)
    cache = model.new_cache(1, capacity=4)
    cache.fix(4)
    with use_rung("fused"):
        model(torch.tensor([[3]], device=DEVICE), cache=cache).sum().backward()
    own = model.model.layers[1].mixer
    assert all(project.weight.grad is not None for project in (own.q_proj, own.k_proj, own.v_proj))
