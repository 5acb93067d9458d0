import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minijamba.cache import Cache, Layout
from minijamba.mamba import Mamba, init_delta
from minijamba.model import Jamba
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

# float64, sums of some tens of terms carried over some tens of steps.
FLOAT64 = 1e-12
RUNGS = ["naive", "parallel"]
BIASES = {"plain": {}, "projection bias": {"mamba_proj_bias": True}, "no convolution bias": {"mamba_conv_bias": False}}
KEPT = ("A_log", "dt_proj.bias")


@pytest.fixture(params=BIASES.values(), ids=BIASES)
def mamba(request, hybrid, long_memory):
    return long_memory(Mamba(replace(hybrid, **request.param))).double()


@pytest.fixture
def x():
    return torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0)).double()


def delta_B_C(m, x):
    delta, B, C = x @ m.x_proj.weight[:3].T, x @ m.x_proj.weight[3:7].T, x @ m.x_proj.weight[7:].T
    return m.dt_proj(m.dt_layernorm(delta)), m.b_layernorm(B), m.c_layernorm(C)


def by_hand(m, x, select=delta_B_C, gate_before_conv=False, window=4):
    """The mixer's equations, one token after the other."""
    inner, states = m.A_log.shape
    x, z = m.in_proj(x).chunk(2, dim=-1)
    if gate_before_conv:
        x, z = z, x
    past, state = x.new_zeros(len(x), window - 1, inner), x.new_zeros(len(x), inner, states)
    outputs = []
    for t in range(x.shape[1]):
        past = torch.cat([past, x[:, t : t + 1]], dim=1)
        u = (past[:, -window:] * m.conv1d.weight[:, 0].T).sum(1)
        u = F.silu(u if m.conv1d.bias is None else u + m.conv1d.bias)
        delta, B, C = select(m, u)
        delta = torch.log1p(delta.exp())
        state = torch.exp(delta[:, :, None] * -m.A_log.exp()) * state + (delta * u)[:, :, None] * B[:, None, :]
        outputs.append(((state * C[:, None, :]).sum(-1) + m.D * u) * F.silu(z[:, t]))
    return m.out_proj(torch.stack(outputs, dim=1))


@pytest.mark.parametrize("rung", RUNGS)
def test_equals_its_equations(mamba, x, rung):
    def norm_after_dt_proj(m, x):
        delta, B, C = delta_B_C(m, x)
        delta = F.linear(x @ m.x_proj.weight[:3].T, m.dt_proj.weight)
        return F.rms_norm(delta, delta.shape[-1:], eps=1e-6) + m.dt_proj.bias, B, C

    def no_norms(m, x):
        delta, B, C = m.x_proj(x).split((3, 4, 4), dim=-1)
        return m.dt_proj(delta), B, C

    def B_and_C_exchanged(m, x):
        delta, B, C = delta_B_C(m, x)
        return delta, C, B

    with use_rung(rung):
        y = mamba(x, Layout())

    def check(select, **changes):
        assert_matches(y, by_hand(mamba, x, select, **changes), FLOAT64, "mixer")

    check(delta_B_C)
    assert_rejects(check, norm_after_dt_proj, no_norms, B_and_C_exchanged)
    assert_rejects(lambda gate_before_conv: check(delta_B_C, gate_before_conv=gate_before_conv), True)


@torch.no_grad()
@pytest.mark.parametrize("rung", RUNGS)
def test_step_form_equals_full_form(hybrid, mamba, x, rung):
    with use_rung(rung):
        expected_cache = Cache(hybrid, 2, dtype=torch.float64).layers[0]
        expected = mamba(x, Layout(), expected_cache)

        def check(forget):
            cache = Cache(hybrid, 2, dtype=torch.float64).layers[0]
            pieces = [mamba(x[:, :3], Layout(), cache)]
            for t in range(3, x.shape[1]):
                forget(cache)
                pieces.append(mamba.step(x[:, t : t + 1], cache))
            assert_matches(torch.cat(pieces, dim=1), expected, FLOAT64, "steps")
            assert_matches(vars(cache), vars(expected_cache), FLOAT64, "cache")

        check(lambda cache: None)
        assert_rejects(check, lambda cache: cache.state.zero_(), lambda cache: cache.window.zero_())


@torch.no_grad()
def test_one_token_takes_the_step_and_only_without_gradients(hybrid, mamba, x, monkeypatch):
    cache = Cache(hybrid, 2, dtype=torch.float64).layers[0]
    steps = []
    monkeypatch.setattr(Mamba, "step", lambda self, x, cache, real: steps.append(real) or x)
    mamba(x[:, :1], Layout(), cache)
    mamba(x[:, :1], Layout(real=torch.tensor([[True], [False]])), cache)
    assert steps[0] is None and steps[1].tolist() == [True, False]
    with torch.enable_grad():
        mamba(x[:, :1], Layout(), cache)
    mamba(x[:, :2], Layout(), cache)
    mamba(x[:, :1], Layout(documents=torch.ones(2, 1, dtype=torch.long)), cache)
    assert len(steps) == 2


@pytest.mark.parametrize("rung", RUNGS)
def test_padding_takes_no_time_and_gives_no_gradient(hybrid, long_memory, x, rung):
    """delta = -inf at padding: the state stands still, and nothing of it reaches a parameter, not even a NaN."""
    mamba = long_memory(Mamba(hybrid)).double()

    def run(x, layout):
        mamba.zero_grad()
        cache = Cache(hybrid, 2, dtype=torch.float64).layers[0]
        with use_rung(rung):
            y = mamba(x, layout, cache)[:, :7]
        (y.sin().sum() + cache.state.sum() + cache.window.sum()).backward()
        return {"y": y, **vars(cache), **{name: p.grad.clone() for name, p in mamba.named_parameters()}}

    expected = run(x[:, :7], Layout())

    def check(real):
        assert_matches(run(x, Layout(real=real)), expected, FLOAT64, "padded")

    check((torch.arange(11) < 7).expand(2, -1))
    assert_rejects(check, (torch.arange(11) < 8).expand(2, -1), None)


def test_decay_and_delta_start_as_mamba_does(hybrid):
    config = replace(hybrid, hidden_size=512, mamba_dt_rank=32, num_attention_heads=8)
    torch.manual_seed(0)
    mamba = Mamba(config)
    assert_matches(mamba.A, -torch.arange(1.0, 5).expand(1024, 4), 1e-6, "A")  # exp(log n): float32 rounding
    assert_matches(mamba.D, torch.ones(1024), 0, "D")

    def check(dt_proj):
        """Steps between 0.001 and 0.1, as many in each decade; the weights uniform in +- r^-0.5."""
        delta = F.softplus(dt_proj.bias.double())
        assert delta.min() > 0.999e-3 and delta.max() < 0.1001
        # Of 1024 draws half lie in each decade, with a standard deviation of 16.
        assert 512 - 5 * 16 < (delta < 0.01).sum() < 512 + 5 * 16
        assert dt_proj.weight.abs().max() <= 32**-0.5 and dt_proj.weight.std() > 0.9 * (32 * 3) ** -0.5

    def with_bias(bias):
        changed = copy.deepcopy(mamba.dt_proj)
        changed.bias = nn.Parameter(bias)
        return changed

    check(mamba.dt_proj)
    uniform = torch.empty(1024).uniform_(1e-3, 0.1)
    no_inverse = torch.empty(1024).uniform_(math.log(1e-3), math.log(0.1)).exp()
    assert_rejects(check, nn.Linear(32, 1024), with_bias(torch.zeros(1024)), with_bias(no_inverse))
    assert_rejects(check, with_bias(torch.log(torch.expm1(uniform))))


def test_init_delta_takes_other_ranges():
    dt_proj = nn.Linear(4, 1000)
    init_delta(dt_proj, shortest=0.5, longest=2.0)
    delta = F.softplus(dt_proj.bias)
    assert 0.499 < delta.min() < 0.51 and 1.95 < delta.max() < 2.001
    init_delta(dt_proj, shortest=1e-7, longest=1e-6, floor=1e-3)
    assert_matches(F.softplus(dt_proj.bias), torch.full((1000,), 1e-3), 1e-5, "floor")


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "twice": lambda m: m.half().to("cpu").bfloat16(),
    "there and back": lambda m: m.bfloat16().float().bfloat16(),
    "copied": lambda m: copy.deepcopy(m.bfloat16()),
    "copied, then cast": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_recurrence_stays_float32_under_half_precision(hybrid, long_memory, cast):
    model = long_memory(Jamba(hybrid))
    original = copy.deepcopy(model.state_dict())

    def check(model):
        for name, parameter in model.named_parameters():
            if name.endswith(KEPT):
                assert_matches(parameter, original[name], 0, name)
                assert parameter.dtype == torch.float32, name
            else:
                assert parameter.dtype in (torch.bfloat16, torch.float16), name

    def rounded_once(module):
        plain = nn.Module._apply
        module = copy.deepcopy(module)
        for mamba in module.modules():
            if isinstance(mamba, Mamba):
                plain(mamba, lambda t: t.bfloat16())
                plain(mamba, lambda t: t.float())
        return module.bfloat16()

    wrong = rounded_once(model)
    check(cast(model))
    assert_rejects(check, wrong)


def test_state_dict_round_trip_keeps_both_types(hybrid, long_memory):
    model = long_memory(Jamba(hybrid)).bfloat16()
    saved = model.state_dict()
    other = Jamba(hybrid).bfloat16()
    other.load_state_dict(saved)
    again = other.state_dict()
    assert {name: t.dtype for name, t in again.items()} == {name: t.dtype for name, t in saved.items()}
    assert_matches(again, saved, 0, "state")
    assert_rejects(lambda state: assert_matches(state, saved, 0), Jamba(hybrid).bfloat16().state_dict())


def test_double_is_double_everywhere(hybrid):
    assert {p.dtype for p in Jamba(hybrid).double().parameters()} == {torch.float64}
    assert {p.dtype for p in Jamba(hybrid).bfloat16().float().parameters()} == {torch.float32}


def test_meta_model_gets_its_types_before_its_memory(hybrid):
    with torch.device("meta"):
        model = Jamba(hybrid)
    model = model.bfloat16().to_empty(device="cpu")
    types = {name.endswith(KEPT): p.dtype for name, p in model.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


@torch.no_grad()
def test_half_precision_runs_with_a_float32_state(hybrid, long_memory):
    mamba = long_memory(Mamba(hybrid))
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    expected = mamba(x, Layout())
    half, cache = copy.deepcopy(mamba).bfloat16(), Cache(hybrid, 2, dtype=torch.bfloat16).layers[0]
    x = x.bfloat16()
    y = torch.cat(
        [half(x[:, :12], Layout(), cache), *(half.step(x[:, t : t + 1], cache) for t in range(12, 24))], dim=1
    )
    assert y.dtype == cache.window.dtype == torch.bfloat16
    assert cache.state.dtype == torch.float32
    # A dozen roundings to 8 bits, 2^-9 each.
    assert_matches(y, expected, 0.02, "bfloat16")
    assert_rejects(lambda y: assert_matches(y, expected, 0.02), torch.zeros_like(y), y.roll(1, dims=1))
