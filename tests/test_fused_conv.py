"""The convolution's kernels: on a GPU where there is one, otherwise in Triton's interpreter."""

import pytest
import torch

from minijamba.conv import causal_conv, causal_conv_step, fused
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the norm. float64: sums in another order. float32: the same, over some hundred tokens. The others round
# inputs, results and gradients to 11 and 8 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Many programs for few tokens and channels."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(fused, name, {"T": 4, "C": 2, "AHEAD": 2, "num_warps": 1})


def arguments(steps=5, channels=3, width=4, batch=1, dtype=torch.float64, bias=True, state=True):
    generator = torch.Generator().manual_seed(steps + channels + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return {
        "x": normal(batch, steps, channels),
        "weight": normal(channels, width),
        "bias": normal(channels) if bias else None,
        "state": normal(batch, width - 1, channels) if state else None,
    }


def packing(batch, steps):
    return torch.randint(0, 2, (batch, steps), generator=torch.Generator().manual_seed(steps)).to(DEVICE)


def naive(*args, **options):
    return causal_conv(*args, rung="naive", **options)


def kernel(*args, **options):
    return causal_conv(*args, rung="fused", **options)


def results(conv, arguments, dtype=torch.float64, view=lambda x: x, **options):
    """y, the new state and every gradient, computed in dtype; x, state and y's gradient may be views."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in arguments.items()}
    x, state = view(leaves["x"]), None if leaves["state"] is None else view(leaves["state"])
    y, new = conv(x, leaves["weight"], leaves["bias"], state=state, return_state=True, **options)
    dy = torch.linspace(-9, 9, y.numel(), dtype=torch.float64, device=DEVICE).sin().view(y.shape).to(dtype)
    torch.autograd.backward([y, new], [view(dy), 2 * new.detach()])
    return {"y": y, "new": new} | {f"d{k}": v.grad for k, v in leaves.items() if v is not None}


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert not value.isnan().any(), name
        error = (value.double() - expected[name].double()).norm()
        assert error <= tolerance * expected[name].double().norm(), f"{name}: off by {error:.1e}"


def assert_equals_naive(arguments, dtype=torch.float64, conv=kernel, view=lambda x: x, **options):
    actual = results(conv, arguments, dtype, view, **options)
    assert_near(actual, results(naive, arguments, **options), TOLERANCES[dtype])


@pytest.mark.parametrize(
    "steps, channels, batch", [(1, 48, 2), (2, 1, 1), (3, 3, 2), (63, 1, 1), (100, 48, 1), (257, 3, 1)]
)
def test_equals_the_definition(steps, channels, batch):
    assert_equals_naive(arguments(steps, channels, batch=batch))


@pytest.mark.parametrize("width, packed", [(1, True), (2, False), (3, True), (8, True)])
def test_any_width_over_many_tiles(small_tiles, width, packed):
    lengths = torch.tensor([9, 3], device=DEVICE)
    given = arguments(steps=9, channels=1, width=width, batch=2)
    assert_equals_naive(given, segments=packing(2, 9) if packed else None, lengths=lengths)


def test_wrong_kernels_would_be_found(small_tiles):
    def check(conv):
        assert_equals_naive(arguments(channels=1, batch=2), conv=conv, segments=packing(2, 5))

    def taps_reversed(x, weight, bias, **options):
        return kernel(x, weight.flip(1), bias, **options)

    def no_state(x, weight, bias, state, **options):
        return kernel(x, weight, bias, state=0 * state, **options)

    def one_document(x, weight, bias, segments, **options):
        return kernel(x, weight, bias, segments=torch.zeros_like(segments), **options)

    def no_activation(x, weight, bias, **options):
        return kernel(x, weight, bias, activation=False, **options)

    def no_gradient_from_the_next_tile(x, weight, bias, **options):
        last = (torch.arange(x.shape[1], device=DEVICE) % 4 == 3)[:, None]
        return kernel(torch.where(last, x.detach(), x), weight, bias, **options)

    def filters_from_one_sequence(x, weight, bias, **options):
        y, state = kernel(x, weight, bias, **options)
        return torch.cat([y[:1], kernel(x, weight.detach(), bias, **options)[0][1:]]), state

    check(kernel)
    assert_rejects(check, taps_reversed, no_state, one_document, no_activation)
    assert_rejects(check, no_gradient_from_the_next_tile, filters_from_one_sequence)


@pytest.mark.parametrize("missing", [{"bias": False}, {"state": False}, {"bias": False, "state": False}])
def test_bias_state_and_activation_can_be_left_out(small_tiles, missing):
    assert_equals_naive(arguments(**missing), activation="bias" in missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(small_tiles, dtype):
    rounded = arguments(steps=6, channels=2, dtype=dtype)
    assert_equals_naive(rounded, dtype, segments=packing(1, 6))
    if dtype == torch.float32:
        wrong = results(kernel, rounded, torch.bfloat16)
        assert_rejects(lambda wrong: assert_near(wrong, results(naive, rounded), TOLERANCES[dtype]), wrong)


def time_last(x):
    """The layout of mamba-ssm, (b, c, t) in memory."""
    return x.mT.contiguous().mT


def half_of_a_projection(x):
    return torch.cat([x, x.flip(0)], dim=-1).chunk(2, dim=-1)[0]


def every_other(x):
    return x.repeat_interleave(2, dim=1)[:, ::2].repeat_interleave(3, dim=2)[:, :, ::3]


@pytest.mark.parametrize("view", [time_last, half_of_a_projection, every_other])
def test_any_strides(small_tiles, view, monkeypatch):
    """No copy is made: the kernels see the strides of the view."""
    x = view(arguments()["x"])
    assert not x.is_contiguous()
    seen, launch = [], fused._forward.run

    def run(*args, **options):
        seen.append(args[1])
        return launch(*args, **options)

    monkeypatch.setattr(fused._forward, "run", run)
    assert_equals_naive(arguments(), view=view)
    assert seen == [x.stride()]
    assert_rejects(lambda view: assert_equals_naive(arguments(), view=view), lambda x: view(x.roll(1, dims=1)))


def test_every_split_carries_the_window_and_its_gradient(small_tiles):
    given = arguments(channels=2)
    whole = results(naive, given)

    def in_two(cut, carry):
        def conv(x, *rest, state, **options):
            first, state = kernel(x[:, :cut], *rest, state=state, **options)
            second, state = kernel(x[:, cut:], *rest, state=carry(state), **options)
            return torch.cat([first, second], dim=1), state

        return conv

    for cut in range(1, 5):
        assert_near(results(in_two(cut, lambda state: state), given), whole, TOLERANCES[torch.float64])

    def check(carry):
        assert_near(results(in_two(2, carry), given), whole, TOLERANCES[torch.float64])

    assert_rejects(check, torch.zeros_like, torch.Tensor.detach)


def test_outputs_are_written_in_full_and_nothing_else_is(small_tiles, monkeypatch):
    """Outputs come as NaN in the middle of sentinels."""
    given, expected = arguments(), results(naive, arguments())
    buffers = []

    def guarded(shape, dtype):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 64,), 7.0, dtype=dtype, device=DEVICE)
        buffer[32 : 32 + size] = torch.nan
        buffers.append(buffer)
        return buffer[32 : 32 + size].view(shape)

    monkeypatch.setattr(torch, "empty_like", lambda tensor: guarded(tensor.shape, tensor.dtype))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda tensor, *shape, dtype=None, **where: (
            new_empty(tensor, *shape, **where) if where else guarded(shape, dtype or tensor.dtype)
        ),
    )
    leaves = {name: tensor.clone() for name, tensor in given.items()}
    y = fused._conv(*leaves.values(), None, True)
    dy = torch.linspace(-9, 9, y.numel(), dtype=torch.float64, device=DEVICE).sin().view(y.shape)
    gradients = fused._conv_backward._init_fn(dy, *leaves.values(), None, True)
    monkeypatch.undo()
    assert len(buffers) == 4

    def check(values, sentinels):
        for value in values:
            assert not value.isnan().any()
        for buffer in sentinels:
            assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()

    check([y, *gradients, buffers[-1][32:-32]], buffers)
    assert_matches(y, expected["y"], 1e-12)
    assert_matches(leaves, given, 0, "inputs")
    unwritten, spilt = torch.full((2,), torch.nan), buffers[0].roll(1)
    assert_rejects(lambda wrong: check(*wrong), ([unwritten], []), ([], [spilt]))


def test_two_runs_give_the_same_bits(small_tiles):
    given = arguments(dtype=torch.float32)
    first = results(kernel, given, torch.float32)
    assert_matches(results(kernel, given, torch.float32), first, 0)
    other = given | {"x": given["x"].nextafter(given["x"] + 1)}
    assert_rejects(lambda given: assert_matches(results(kernel, given, torch.float32), first, 0), other)


def test_gradcheck(small_tiles):
    given = [tensor.requires_grad_() for tensor in arguments(steps=3, channels=1, width=2).values()]

    def conv(x, weight, bias, state):
        return kernel(x, weight, bias, state=state, segments=torch.tensor([[0, 0, 1]], device=DEVICE))

    assert torch.autograd.gradcheck(conv, given)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, *rest: conv(x, *rest) + x - x.detach(), given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(small_tiles, backend):
    torch.compiler.reset()
    given, segments = arguments(channels=1), packing(1, 5)
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    assert_near(results(compiled, given, segments=segments), results(naive, given, segments=segments), 1e-12)
    wrong = results(naive, given)
    assert_rejects(lambda wrong: assert_near(results(compiled, given, segments=segments), wrong, 1e-12), wrong)


def test_operators_keep_their_word(small_tiles):
    """Schema, autograd and shapes without data, as torch.library tests them."""
    leaves = [tensor.requires_grad_() for tensor in arguments(channels=1).values()]
    documents = torch.zeros(1, 8, dtype=torch.long, device=DEVICE)
    x, weight, *_ = leaves
    for inputs in (*leaves, documents, True), (time_last(x.detach()).requires_grad_(), weight, None, None, None, False):
        torch.library.opcheck(torch.ops.minijamba.conv.default, inputs)
        plain = [value.detach() if torch.is_tensor(value) else value for value in inputs]
        torch.library.opcheck(torch.ops.minijamba.conv_backward.default, (torch.ones_like(x), *plain))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [5, 300])
def test_step_equals_one_token_of_the_whole(width, channels):
    x, weight, bias, state = arguments(3, channels, width, batch=2).values()
    expected, window = naive(x, weight, bias, state=state, return_state=True)

    def check(step):
        own = time_last(state.clone())
        y = torch.stack([step(own, time_last(x)[:, t], weight, bias) for t in range(3)], dim=1)
        assert_matches(y, expected, 1e-12, "y")
        assert_matches(own, window, 0, "window")

    def fused_step(*args):
        return causal_conv_step(*args, rung="fused")

    check(fused_step)
    check(lambda *args: causal_conv_step(*args, rung="naive"))
    if width > 1:
        assert_rejects(check, lambda window, *rest: fused_step(window.clone(), *rest))
    with use_rung("fused"):
        linear = causal_conv_step(state.clone(), x[:, 0], weight, activation=False)
    assert_matches(linear, naive(x, weight, state=state, activation=False)[:, 0], 1e-12, "no bias, no activation")


def test_step_compiles_into_one_graph():
    torch.compiler.reset()
    x, weight, bias, state = arguments(1).values()
    real = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for rows in (None, real):
        arguments_of_step = (state.clone(), x[:, 0], weight, bias, True, rows)
        torch.library.opcheck(torch.ops.minijamba.conv_step.default, arguments_of_step)
    compiled = torch.compile(causal_conv_step, fullgraph=True, backend="aot_eager")
    expected, last = naive(x, weight, bias, state=state, return_state=True)

    def check(window):
        assert_matches(compiled(window, x[:, 0], weight, bias, rung="fused"), expected[:, 0], 1e-12)
        assert_matches(window, last, 0)

    check(state.clone())
    assert_rejects(check, torch.zeros_like(state))


def test_step_in_half_precision():
    x, weight, bias, state = arguments(1, dtype=torch.bfloat16).values()
    wide = [tensor.double() for tensor in (state, x[:, 0], weight, bias)]
    expected = causal_conv_step(*wide, rung="naive")

    def check(window):
        y = causal_conv_step(window, x[:, 0], weight, bias, rung="fused")
        assert_near({"y": y, "window": window}, {"y": expected, "window": wide[0]}, TOLERANCES[torch.bfloat16])

    check(state.clone())
    assert_rejects(check, torch.zeros_like(state))
