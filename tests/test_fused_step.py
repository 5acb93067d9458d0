"""The kernels of the decode step and of the inner norms: on a GPU where there is one, or in Triton's interpreter."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minijamba import fused_linear, fused_norm
from minijamba.cache import Cache, Layout
from minijamba.conv import fused as fused_conv
from minijamba.mamba import Mamba
from minijamba.norm import RMSNorm
from minijamba.rungs import use_rung
from minijamba.scan import fused_step, selective_scan
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest value. float64: sums in another order. float32: the same, through exp and log. bfloat16: a dozen
# roundings one after the other, 2^-9 each, or 2^-8 in the interpreter, which cuts off.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
ARGUMENTS = ("state", "x", "delta", "A", "B", "C", "D", "z", "delta_bias")


def one_token(batch, channels, states, dtype=torch.float64, without=()):
    """Arguments of a step, after a long memory: delta near 0.01."""
    generator = torch.Generator().manual_seed(channels + states)
    shapes = [(batch, channels, states), *[(batch, channels)] * 2, (channels, states), *[(batch, states)] * 2]
    shapes += [(channels,), (batch, channels), (channels,)]
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for name, shape in zip(ARGUMENTS, shapes, strict=True)
    }
    wide = torch.promote_types(dtype, torch.float32)
    values |= {"A": -values["A"].exp().to(wide), "state": values["state"].to(wide)}
    values |= {"delta_bias": (0.3 * values["delta_bias"] - 4.6).to(wide)}
    return {name: None if name in without else value for name, value in values.items()}


def definition(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus=True):
    """y and the next state of the naive scan over one token, in float64."""
    state, x, delta, A, B, C, D, z, delta_bias = (
        None if value is None else value.double() for value in (state, x, delta, A, B, C, D, z, delta_bias)
    )
    x, delta, B, C, z = (None if value is None else value[:, None] for value in (x, delta, B, C, z))
    y, state = selective_scan(
        x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, state=state, return_state=True,
        rung="naive",
    )  # fmt: skip
    return {"y": y[:, 0], "state": state}


def kernel(state, *rest, delta_softplus=True):
    state = state.clone()
    return {"y": fused_step.step(state, *rest, delta_softplus), "state": state}


@pytest.mark.parametrize("batch, channels, states", [(1, 1, 1), (2, 3, 5), (3, 48, 16), (1, 130, 64)])
def test_step_equals_the_definition(batch, channels, states):
    given = one_token(batch, channels, states)

    def check(step):
        assert_matches(step(*given.values()), definition(*given.values()), 1e-12)

    check(kernel)
    check(lambda *given: kernel(*[value.repeat_interleave(2, dim=-1)[..., ::2] for value in given]))
    names = dict(zip(ARGUMENTS, range(9), strict=True))

    def without(name):
        return lambda *given: kernel(*[0 * v if i == names[name] else v for i, v in enumerate(given)])

    assert_rejects(check, *map(without, ("state", "B", "C", "D", "z", "delta_bias")))


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_step_leaves_out_what_is_missing(without):
    given = one_token(2, 3, 5, without=without)
    given["delta"] = given["delta"].abs()
    for softplus in (True, False):
        expected = definition(*given.values(), delta_softplus=softplus)
        assert_matches(kernel(*given.values(), delta_softplus=softplus), expected, 1e-12)

    def check(softplus):
        assert_matches(kernel(*given.values(), delta_softplus=softplus), expected, 0.01)

    assert_rejects(check, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_of_short_types_is_computed_in_float32(dtype):
    given = one_token(2, 48, 16, dtype)
    expected = definition(*given.values())

    def check(given):
        result = kernel(*given.values())
        assert result["y"].dtype == dtype and result["state"].dtype == torch.float32
        assert_matches(result["y"], expected["y"], TOLERANCES[dtype], "y")
        assert_matches(result["state"], expected["state"], TOLERANCES[torch.float32], "state")

    check(given)
    assert_rejects(check, given | {"state": 1.001 * given["state"]})


def test_operators_keep_their_word(mixer):
    """What they change, schema and shapes without data, as torch.library tests them."""
    torch.library.opcheck(torch.ops.minijamba.step.default, (*one_token(2, 3, 5).values(), True))
    _, mamba = mixer(torch.float64)
    state, x, z = (one_token(2, 48, 5)[name] for name in ("state", "x", "z"))
    norms = [norm.weight.detach() for norm in (mamba.dt_layernorm, mamba.b_layernorm, mamba.c_layernorm)]
    rest = [v.detach() for v in (mamba.dt_proj.weight, mamba.dt_proj.bias, mamba.A_log, mamba.D)]
    arguments = (state, x, z, mamba.x_proj(x).detach(), norms, 1e-6, *rest)
    torch.library.opcheck(torch.ops.minijamba.select_and_step.default, arguments)


def test_extreme_lengths_stay_finite():
    """Padding (-inf) leaves the state as it is, a long step forgets it."""
    given = one_token(1, 4, 5, torch.float32)
    given["delta"] = torch.tensor([[-torch.inf, -200.0, 80.0, 3e4]], device=DEVICE)
    result = kernel(*given.values())
    assert_matches(result, definition(*given.values()), 1e-5)
    assert_matches(result["state"][:, :2], given["state"][:, :2], 0, "padding")
    assert_rejects(lambda c: assert_matches(result["state"][:, c], given["state"][:, c], 0.5), 2, 3)


@pytest.fixture
def mixer(hybrid, long_memory):
    """`mixer(dtype, **changes)`: its configuration and a mixer of 48 channels, whose memory is long and selective."""

    def build(dtype, **changes):
        config = replace(hybrid, hidden_size=24, **({"mamba_dt_rank": 20, "mamba_d_state": 5} | changes))
        mamba = long_memory(Mamba(config))
        mamba.dt_proj.weight.data *= 4
        return config, mamba.to(DEVICE).to(dtype)

    return build


def steps(rung, config, mamba, batch, dtype, tokens=2):
    """Outputs and cache after some tokens from a random cache."""
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(DEVICE, dtype)

    cache = Cache(config, batch, dtype=dtype, device=DEVICE).layers[0]
    cache.window.copy_(normal(*cache.window.shape))
    cache.state.copy_(normal(*cache.state.shape))
    with use_rung(rung), torch.no_grad():
        outputs = [mamba(normal(batch, 1, 24), Layout(), cache) for _ in range(tokens)]
    return {"y": torch.cat(outputs, dim=1), **vars(cache)}


@pytest.mark.parametrize(
    "dtype, batch",
    [(torch.float64, 2), (torch.float32, 9), (torch.bfloat16, 1), (torch.bfloat16, 17)],
)
def test_mixer_step_equals_the_definition(mixer, dtype, batch):
    """From 8 sequences on, short types take dt_proj as a matrix product of 16 rows."""
    config, mamba = mixer(dtype)
    expected = steps("naive", config, copy.deepcopy(mamba).double(), batch, torch.float64)

    def check(mamba):
        assert_matches(steps("fused", config, mamba, batch, dtype), expected, TOLERANCES[dtype])

    def changed(name, change):
        wrong = copy.deepcopy(mamba)
        parameter = wrong.get_parameter(name)
        parameter.data = change(parameter.data)
        return wrong

    check(mamba)
    if batch in (2, 17):
        assert_rejects(check, changed("dt_proj.weight", lambda w: w.roll(1, 1)))
        assert_rejects(check, *(changed(f"{name}_layernorm.weight", torch.ones_like) for name in ("dt", "b", "c")))
        assert_rejects(check, *(changed(name, torch.zeros_like) for name in ("A_log", "dt_proj.bias")))


@pytest.mark.parametrize("sizes", [{"mamba_d_state": 1, "mamba_dt_rank": 1}, {"mamba_d_state": 64, "mamba_d_conv": 2}])
def test_mixer_step_of_other_sizes(mixer, sizes):
    config, mamba = mixer(torch.float64, **sizes, mamba_conv_bias=False, mamba_proj_bias=True)
    expected = steps("naive", config, mamba, 2, torch.float64)
    assert_matches(steps("fused", config, mamba, 2, torch.float64), expected, 1e-12)
    other = mixer(torch.float64, mamba_conv_bias=False, mamba_proj_bias=True)

    def check(other):
        assert_matches(steps("fused", *other, 2, torch.float64)["y"], expected["y"], 1e-3)

    assert_rejects(check, other)


def test_mixer_step_is_five_launches(mixer, monkeypatch):
    config, mamba = mixer(torch.float32)
    launched = []
    for kernel in fused_conv._step, fused_linear._product, fused_step._select_and_step:
        monkeypatch.setattr(kernel, "run", lambda *_, kernel=kernel, **__: launched.append(kernel))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if not function.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
                launched.append(name)
            return function(*args, **(kwargs or {}))

    def check(rung):
        launched.clear()
        cache = Cache(config, 2, device=DEVICE).layers[0]
        x = torch.randn(2, 1, 24, device=DEVICE)
        with torch.no_grad(), use_rung(rung), Operations():
            mamba(x, Layout(), cache)
        assert launched == ["mm", fused_conv._step, fused_linear._product, fused_step._select_and_step, "mm"]

    fused_linear._arrivals(DEVICE, 1)  # made once
    check("fused")
    assert_rejects(check, "parallel")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_steps_compile_into_one_graph(mixer, backend):
    torch.compiler.reset()
    given = one_token(2, 3, 5)
    compiled = torch.compile(fused_step.step, fullgraph=True, backend=backend)

    def check(change):
        state = change(given["state"])
        y = compiled(state, *list(given.values())[1:], True)
        assert_matches({"y": y, "state": state}, definition(*given.values()), 1e-12)

    check(torch.clone)
    assert_rejects(check, torch.zeros_like)


@pytest.mark.parametrize("rung", ["parallel", "fused"])
def test_mixer_equals_the_definition_with_gradients(mixer, rung):
    """A prompt, padded and continued by steps."""
    config, mamba = mixer(torch.float64, mamba_dt_rank=3)
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0)).double().to(DEVICE)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=DEVICE).bool()

    def run(rung, layout=None):
        mamba.zero_grad()
        cache = Cache(config, 2, dtype=torch.float64, device=DEVICE).layers[0]
        with use_rung(rung):
            y = mamba(x, layout or Layout(real=real), cache).masked_fill(~real[:, :, None], 0)
            (y.sin().sum() + cache.state.square().sum()).backward()
            cache.window, cache.state = cache.window.detach(), cache.state.detach()
            with torch.no_grad():
                after = mamba(x[:, :1], Layout(), cache)
        gradients = {name: parameter.grad.clone() for name, parameter in mamba.named_parameters()}
        return {"y": y, "after": after, **vars(cache), **gradients}

    expected = run("naive")
    assert_matches(run(rung), expected, 1e-12, "mixer")
    assert_rejects(lambda layout: assert_matches(run(rung, layout), expected, 1e-12), Layout(real=real.roll(1, 0)))


SIZES = (20, 5, 1)


def norm_arguments(*shape, dtype=torch.float64, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, sum(sizes), generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x, [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def plain_norms(x, weights, eps):
    def norm(part, weight):
        module = RMSNorm(len(weight), eps)
        del module.weight
        module.weight = weight
        return module(part)

    parts = x.split([len(weight) for weight in weights], dim=-1)
    with use_rung("naive"):
        return [norm(part, weight) for part, weight in zip(parts, weights, strict=True)]


def norm_results(norms, x, weights, dtype=torch.float64, eps=1e-3):
    x, *weights = (tensor.to(dtype).requires_grad_() for tensor in (x, *weights))
    parts = norms(x, weights, eps)
    dparts = [torch.linspace(-1, 1, part.numel()).to(part).view(part.shape) for part in parts]
    return {"parts": list(parts), "gradients": list(torch.autograd.grad(parts, [x, *weights], dparts))}


@pytest.mark.parametrize(
    "shape, dtype",
    [((1,), torch.float64), ((3, 7), torch.float64), ((2, 9), torch.float32), ((9,), torch.bfloat16)],
)
def test_norms_equal_three_norms(shape, dtype):
    given = norm_arguments(*shape, dtype=dtype)
    expected = norm_results(plain_norms, *given)

    def check(norms):
        assert_matches(norm_results(norms, *given, dtype), expected, TOLERANCES[dtype])

    check(fused_norm.rms_norms)
    check(lambda x, weights, eps: fused_norm.rms_norms(x.mT.contiguous().mT, weights, eps))
    assert_rejects(check, lambda x, weights, eps: fused_norm.rms_norms(x, weights, 9 * eps + 1))
    assert_rejects(check, lambda x, weights, eps: fused_norm.rms_norms(x, [w.flip(0) + 1 for w in weights], eps))
    if sum(shape) > 1:
        assert_rejects(check, lambda x, weights, eps: fused_norm.rms_norms(x.flip(0), weights, eps))


def test_norms_fill_their_outputs(monkeypatch):
    x, weights = norm_arguments(9)
    new_empty = torch.Tensor.new_empty
    poisoned = []

    def poison(tensor, *shape, **options):
        new = new_empty(tensor, *shape, **options)
        if "device" not in options:
            poisoned.append(new.fill_(torch.nan))
        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    parts = fused_norm._norms(x, weights, 1e-3)
    fused_norm._norms_backward._init_fn([torch.ones_like(part) for part in parts], x, weights, 1e-3)
    assert len(poisoned) == 5

    def check(tensors):
        assert not any(tensor.isnan().any() for tensor in tensors)

    check(poisoned)
    assert_rejects(check, [new_empty(x, 2).fill_(torch.nan)])


def test_norms_operators_keep_their_word():
    x, weights = norm_arguments(2, sizes=(3, 1))
    dparts = plain_norms(x, weights, 1e-3)
    torch.library.opcheck(torch.ops.minijamba.rms_norms_backward.default, (dparts, x, weights, 1e-3))
    x, weights = x.requires_grad_(), [weight.requires_grad_() for weight in weights]
    torch.library.opcheck(torch.ops.minijamba.rms_norms.default, (x, weights, 1e-3))

    def norms(x, *weights):
        return fused_norm.rms_norms(x, list(weights), 1e-3)

    assert torch.autograd.gradcheck(norms, [x, *weights])
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, *weights: norms(x, *weights)[0] * (1 + x - x.detach()).sum(), [x, *weights])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_norms_compile_into_one_graph(backend):
    torch.compiler.reset()
    x, weights = norm_arguments(2, 3)
    compiled = torch.compile(fused_norm.rms_norms, fullgraph=True, backend=backend)

    def check(x):
        assert_matches(norm_results(compiled, x, weights), expected, 1e-12)

    expected = norm_results(plain_norms, x, weights)
    check(x)
    assert_rejects(check, x.flip(0))
