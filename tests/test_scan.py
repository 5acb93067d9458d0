import math
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.jamba.modeling_jamba import mamba_selective_scan, mamba_selective_state_update

from minijamba.scan import naive, parallel, selective_scan, selective_scan_fn, selective_step
from minijamba.testing import assert_matches, assert_rejects

# float64, sums over a memory of some hundred steps, in another order.
FLOAT64 = 1e-12
# float32 rounds every step by 6e-8; a memory of a hundred steps adds up its roundings.
FLOAT32 = 5e-6
LENGTHS = [1, 2, 3, 63, 100, 257]
RUNGS = pytest.mark.parametrize("rung", ["naive", "parallel"])

# Tiny tensors would all fit into one chunk. Chunk sizes here are in steps; a wide step turns the blocks off.
PLANS = {
    "one chunk": {"BLOCK": 16},
    "chunks of 16": {"CHUNK_SIZE": 1},
    "chunks of 4 blocks": {"BLOCK": 4, "CHUNK_SIZE": 16 * 2 * 3 * 4},
    "no blocks": {"WIDE_STEP": 0},
}


def draw(batch=2, steps=9, channels=3, states=4, seed=0, dtype=torch.float64):
    """Arguments with a long memory: steps of about softplus(-4.6) = 0.01, so that a lost state shows long after."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, steps, channels),
        "delta": normal(batch, steps, channels),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, steps, states),
        "C": normal(batch, steps, states),
        "D": normal(channels),
        "z": normal(batch, steps, channels),
        "delta_bias": normal(channels) - 4.6,
        "state": normal(batch, channels, states),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def at(inputs, rows=slice(None), steps=slice(None)):
    """The arguments of some rows and steps."""
    over_time = ("x", "delta", "B", "C", "z")
    return {
        name: tensor[rows, steps] if name in over_time else tensor[rows] if name == "state" else tensor
        for name, tensor in inputs.items()
    }


def scan(rung="parallel", **arguments):
    return selective_scan(**arguments, delta_softplus=True, return_state=True, rung=rung)


def by_definition(**arguments):
    return scan("naive", **arguments)


def with_gradients(run, inputs, **options):
    """y, the last state, and the gradient of every argument through both."""
    y, state = run(**inputs, **options)
    loss = sum((torch.arange(out.numel()).cos() * out.double().flatten()).sum() for out in (y, state))
    names = [name for name, tensor in inputs.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(loss, [inputs[name] for name in names], materialize_grads=True)
    return {"y": y, "state": state} | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}


def pieces(run, cuts):
    """A scan that runs a sequence in pieces, each from the state that the one before it returned."""

    def in_pieces(state, **arguments):
        steps = arguments["x"].shape[1]
        outputs = []
        for start, end in pairwise([0, *cuts, steps]):
            piece = at(arguments, steps=slice(start, end))
            y, state = run(state=state, **piece)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return in_pieces


def loop(
    x, delta, A, B, C, D, z, delta_bias, state, segments=None,
    zero_order_hold_of_B=False, read_before_update=False, bias_twice=False, no_gate=False,
):  # fmt: skip
    """The recurrence once more, with mistakes to choose from."""
    delta = F.softplus(delta + delta_bias * (2 if bias_twice else 1))
    outputs = []
    for t in range(x.shape[1]):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None]
        exponent = delta[:, t, :, None] * A
        step = torch.expm1(exponent) / A if zero_order_hold_of_B else delta[:, t, :, None]
        old, state = state, torch.exp(exponent) * state + step * B[:, t, None] * x[:, t, :, None]
        outputs.append(((old if read_before_update else state) * C[:, t, None]).sum(-1) + D * x[:, t])
    y = torch.stack(outputs, dim=1)
    return y if no_gate else y * F.silu(z), state


def mistake(name):
    def wrong(**arguments):
        return loop(**arguments, **{name: True})

    wrong.__name__ = name
    return wrong


MISTAKES = [mistake(name) for name in ("zero_order_hold_of_B", "read_before_update", "bias_twice", "no_gate")]


@pytest.mark.parametrize("run", [by_definition, scan, loop])
def test_textbook_case(run):
    """Steps of ln 2 halve a state of rate -1 and quarter one of rate -2; B = 1 / ln 2 adds x as it is.

    x               8     4     2
    first state     8     8     6      8/2 + 4 = 8,  8/2 + 2 = 6
    second state    8     6    3.5     8/4 + 4 = 6,  6/4 + 2 = 3.5
    y = first - second + x / 2
                    4     4    3.5
    """
    def check(run):
        y, state = run(
            x=torch.tensor([[[8.0], [4.0], [2.0]]]).double(),
            delta=torch.zeros(1, 3, 1).double(),
            A=torch.tensor([[-1.0, -2.0]]).double(),
            B=torch.full((1, 3, 2), 1 / math.log(2), dtype=torch.float64),
            C=torch.tensor([1.0, -1.0]).double().expand(1, 3, 2),
            D=torch.tensor([0.5]).double(),
            z=torch.full((1, 3, 1), 30.0).double(),  # silu(30) = 30
            delta_bias=torch.zeros(1).double(),  # softplus(0) = ln 2
            state=torch.zeros(1, 1, 2).double(),
        )
        assert_matches(y / 30, [[[4.0], [4.0], [3.5]]], 1e-12, "y")
        assert_matches(state, [[[6.0, 3.5]]], 1e-14, "state")

    check(run)
    assert_rejects(check, *(wrong for wrong in MISTAKES if wrong.__name__ != "bias_twice"))


@pytest.mark.parametrize("steps", LENGTHS)
def test_the_definition_is_the_recurrence(steps):
    inputs = draw(steps=steps)
    segments = torch.arange(steps).div(5, rounding_mode="floor").expand(2, -1)

    def check(run):
        for packing in (None, segments):
            expected = with_gradients(by_definition, inputs, segments=packing)
            assert_matches(with_gradients(run, inputs, segments=packing), expected, FLOAT64, "loop")

    check(loop)
    assert_rejects(check, *MISTAKES)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("steps", LENGTHS)
def test_parallel_equals_the_definition(steps, packed, plan):
    inputs = draw(steps=steps)
    segments = torch.tensor([[7] * 20 + [3] * 12 + [7] * 225, [1] * 16 + [2] * 241])[:, :steps] if packed else None

    def check(run, tolerance=FLOAT64, dtype=torch.float64):
        expected = with_gradients(by_definition, inputs, segments=segments)
        narrow = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        assert_matches(with_gradients(run, narrow, segments=segments), expected, tolerance, "scan")

    def state_lost_between_chunks(segments, **arguments):
        return pieces(lambda state, **piece: loop(**piece, state=torch.zeros_like(state)), [16, 32, 48])(**arguments)

    def documents_leak(segments, **arguments):
        return loop(**arguments)

    with patch.multiple(parallel, **plan):
        check(scan)
        check(scan, FLOAT32, torch.float32)
    if steps == 63:
        assert_rejects(check, state_lost_between_chunks, *([documents_leak] if packed else []))


@RUNGS
def test_every_split_equals_the_whole(rung):
    inputs = draw(steps=8)

    def whole(**arguments):
        return scan(rung, **arguments)

    expected = with_gradients(by_definition, inputs)

    def check(run, cuts=range(1, 8)):
        assert_matches(with_gradients(pieces(run, cuts), inputs), expected, FLOAT64, "pieces")

    for cut in range(1, 8):
        check(whole, [cut])
    check(whole)
    assert_rejects(
        check,
        lambda state, **piece: whole(state=torch.zeros_like(state), **piece),
        lambda state, **piece: whole(state=state.detach(), **piece),
        lambda state, **piece: whole(state=state.float().double(), **piece),
    )


@RUNGS
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_packed_documents_equal_separate_runs(rung, plan):
    """The first document continues the incoming state, the others start from zero; a number may return."""
    inputs = draw(batch=1, steps=40)
    bounds = list(pairwise([0, 1, 17, 32, 33, 40]))
    segments = torch.tensor([[4] + [2] * 16 + [4] * 15 + [9] + [2] * 7])

    def separately(state, **arguments):
        outputs = []
        for start, end in bounds:
            y, last = scan(rung, **at(arguments, steps=slice(start, end)), state=state)
            outputs.append(y)
            state = torch.zeros_like(state)
        return torch.cat(outputs, dim=1), last

    expected = with_gradients(separately, inputs)

    def check(segments):
        assert_matches(with_gradients(scan, inputs, rung=rung, segments=segments), expected, FLOAT64, "packed")

    with patch.multiple(parallel, **plan):
        check(segments)
        assert_rejects(check, None, segments * 0, segments.roll(1, 1), segments.flip(1))


@RUNGS
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_is_a_step_of_length_zero(rung, side):
    """delta = -inf passes through any bias and the softplus as exactly zero: decay one, input zero, no gradient."""
    inputs = draw(batch=1, steps=20)
    real = torch.ones(20, dtype=torch.bool)
    real[{"left": slice(0, 6), "right": slice(14, 20), "inside": slice(7, 11)}[side]] = False

    def padded(delta, z, padding=-torch.inf, **arguments):
        y, state = scan(rung, delta=delta.masked_fill(~real[:, None], padding), z=z, **arguments)
        return y[:, real], state

    expected = with_gradients(
        lambda **arguments: by_definition(**at(arguments, steps=real)), inputs
    )

    def check(padding):
        assert_matches(with_gradients(padded, inputs, padding=padding), expected, FLOAT64, "padded")

    check(-torch.inf)
    assert_rejects(check, 0.0, -20.0)

    y, state = scan(rung, **(draw(steps=3) | {"delta": torch.full((2, 3, 3), -torch.inf).double()}))
    assert_matches(state, draw(steps=3)["state"], 0, "state after padding alone")


@given(st.data())
@settings(max_examples=30)
def test_any_shape_packing_padding_and_split(data):
    sizes = {name: data.draw(st.integers(1, 4), name) for name in ("batch", "channels", "states")}
    steps = data.draw(st.integers(1, 70), "steps")
    inputs = draw(steps=steps, seed=data.draw(st.integers(0, 99), "seed"), **sizes)
    shape = (sizes["batch"], steps)
    generator = torch.Generator().manual_seed(steps)
    segments = torch.randint(0, 8, shape, generator=generator).eq(0).cumsum(1) if data.draw(st.booleans()) else None
    padding = torch.randint(0, 4, shape, generator=generator).eq(0) & data.draw(st.booleans(), "padded")
    plan = PLANS[data.draw(st.sampled_from(list(PLANS)), "plan")]
    cut = data.draw(st.integers(0, steps), "cut")

    def split(delta, state, rung="parallel", cut=cut, **arguments):
        delta = delta.masked_fill(padding[:, :, None], -torch.inf)
        outputs = []
        for start, end in pairwise(sorted({0, cut, steps})):
            here = slice(start, end)
            ids = None if segments is None else segments[:, here]
            if ids is not None and start > 0:
                changes = ids[:, 0] != segments[:, start - 1]
                state = state.masked_fill(changes[:, None, None], 0)
            y, state = scan(rung, **at(arguments | {"delta": delta}, steps=here), state=state, segments=ids)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    expected = with_gradients(split, inputs, rung="naive", cut=0)
    with patch.multiple(parallel, **plan):
        assert_matches(with_gradients(split, inputs), expected, FLOAT64, "scan")


@RUNGS
def test_gradcheck(rung):
    inputs = draw(batch=1, steps=7, channels=2, states=2)
    segments = torch.tensor([[0] * 5 + [1] * 2])

    def run(*tensors):
        return scan(rung, **dict(zip(inputs, tensors, strict=True)), segments=segments)

    with patch.multiple(parallel, BLOCK=2, CHUNK_SIZE=16):
        assert torch.autograd.gradcheck(run, tuple(inputs.values()))
        if rung == "naive":
            assert torch.autograd.gradgradcheck(run, tuple(inputs.values()))


def test_parallel_refuses_second_derivatives():
    x = draw()["x"]
    y, _ = scan(**(draw() | {"x": x}))
    with pytest.raises(RuntimeError, match="the parallel scan .* create_graph=True: pass rung='naive'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "state"])
@RUNGS
def test_optional_arguments(rung, left_out):
    """Leaving one out equals its neutral value."""
    inputs = draw()
    neutral = {"D": 0.0, "delta_bias": 0.0, "state": 0.0, "z": 1.2784645427610738}  # silu(1.278...) = 1
    filled = inputs | {left_out: torch.full_like(inputs[left_out], neutral[left_out])}
    expected, state = by_definition(**filled)

    def check(name):
        y, last = scan(rung, **{key: value for key, value in inputs.items() if key != name})
        assert_matches({"y": y, "state": last}, {"y": expected, "state": state}, FLOAT64, f"without {name}")

    check(left_out)
    assert_rejects(check, *({"D", "z", "delta_bias", "state"} - {left_out}))
    y = selective_scan(**inputs, delta_softplus=True, rung=rung)
    assert_matches(y, by_definition(**inputs)[0], FLOAT64, "y alone")


@RUNGS
def test_without_softplus(rung):
    inputs = draw()
    steps = F.softplus(inputs["delta"] + inputs["delta_bias"])
    y = selective_scan(**(inputs | {"delta": steps, "delta_bias": None}), rung=rung)
    assert_matches(y, by_definition(**inputs)[0], FLOAT64, "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@RUNGS
def test_half_precision_keeps_a_float32_state(rung, dtype):
    half = draw(steps=100, dtype=dtype) | {name: draw(steps=100, dtype=torch.float32)[name] for name in ("A", "state")}
    wide = {name: tensor.detach().double() for name, tensor in half.items()}
    y, state = scan(rung, **half)
    expected, last = by_definition(**wide)

    def check(state, y=y):
        assert state.dtype == torch.float32 and y.dtype == dtype
        assert_matches(state, last, FLOAT32, "state")
        # One rounding of the result, half a unit of the last place.
        assert_matches(y, expected, torch.finfo(dtype).eps / 2 + FLOAT32, "y")

    check(state)
    assert_rejects(check, state.to(dtype).float())
    for name, gradient in with_gradients(lambda **a: scan(rung, **a), half).items():
        assert name in ("y", "state") or gradient.dtype == half[name.split()[-1]].dtype


@RUNGS
def test_autocast_changes_nothing(rung):
    inputs = draw(steps=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = scan(rung, **inputs)
    expected = scan(rung, **inputs)
    assert_matches([y, state], list(expected), 0, "under autocast")


def test_long_steps_underflow_without_harm():
    """Decays of e^-700 and less: nothing may be divided by their products."""
    inputs = draw(batch=1, steps=64)
    inputs["delta_bias"] = inputs["delta_bias"] + 300

    def divided_by_cumulative_products(x, delta, A, B, C, D, z, delta_bias, state):
        delta = F.softplus(delta + delta_bias)
        product = torch.exp(delta[..., None] * A).cumprod(1)
        states = product * (state[:, None] + ((delta * x)[..., None] * B[:, :, None] / product).cumsum(1))
        return ((states * C[:, :, None]).sum(-1) + D * x) * F.silu(z), states[:, -1]

    def check(run, inputs=inputs):
        assert_matches(list(run(**inputs)), list(by_definition(**inputs)), FLOAT64, "scan")

    check(scan)
    check(divided_by_cumulative_products, draw(batch=1, steps=9))
    assert_rejects(check, divided_by_cumulative_products)


@RUNGS
def test_wide_layers_and_single_tokens(rung):
    for channels, steps in (8192, 3), (8192, 1), (1, 1):
        inputs = draw(batch=1, steps=steps, channels=channels, states=2)
        assert_matches(list(scan(rung, **inputs)), list(loop(**inputs)), FLOAT64, f"{channels} channels")


@RUNGS
def test_arguments_stay_unchanged(rung):
    inputs = draw(steps=20)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    y, state = scan(rung, **inputs)
    (y.sum() + state.sum()).backward()
    assert_matches(inputs, before, 0, "arguments")
    assert state.is_contiguous() and state.data_ptr() != inputs["state"].data_ptr()


def saved_numbers(rung, steps):
    """Numbers that autograd keeps for the backward pass, each memory counted once."""
    inputs = draw(batch=1, steps=steps, channels=16, states=16)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = scan(rung, **inputs)
    assert outputs[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


class Largest(TorchDispatchMode):
    """Notes the most numbers in any tensor made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def test_memory_does_not_grow_as_time_times_states():
    """Kept for the backward pass: ten tensors (b, t, c) at most, and one state in 256 steps."""

    def check(rung):
        steps = 1024
        assert saved_numbers(rung, steps) < 10 * steps * 16 + steps // 256 * 16 * 16 + 2000

    check("parallel")
    assert_rejects(check, "naive")


def test_working_memory_does_not_grow_with_time():
    def largest(run, steps):
        inputs = draw(batch=1, steps=steps, channels=4, states=64)
        with Largest() as largest:
            with_gradients(run, inputs)
        return largest.numbers

    def check(run):
        assert largest(run, 512) == largest(run, 1024)

    def all_states_at_once(x, delta, A, **arguments):
        torch.exp(F.softplus(delta)[..., None] * A)
        return scan(x=x, delta=delta, A=A, **arguments)

    check(scan)
    assert_rejects(check, all_states_at_once)


def test_step_equals_scan():
    inputs = draw(steps=20)
    expected = by_definition(**inputs)

    def check(step):
        state = inputs["state"].detach().clone()
        place = state.data_ptr()
        outputs = []
        for t in range(20):
            token = {name: inputs[name][:, t] for name in ("x", "delta", "B", "C", "z")}
            weights = {name: inputs[name] for name in ("A", "D", "delta_bias")}
            outputs.append(step(state, **token, **weights, delta_softplus=True))
        assert_matches([torch.stack(outputs, dim=1), state], list(expected), 1e-14, "steps")
        assert state.data_ptr() == place and not outputs[0].requires_grad

    def state_not_updated(state, *args, **kwargs):
        return selective_step(state.clone(), *args, **kwargs)

    check(selective_step)
    assert_rejects(check, state_not_updated)


def in_their_layout(inputs):
    """Arguments of selective_scan_fn: time last."""
    arguments = {"u" if name == "x" else name: tensor for name, tensor in inputs.items() if name != "state"}
    return arguments | {name: arguments[name].mT for name in ("u", "delta", "B", "C", "z")}


@pytest.mark.parametrize("grouped", [False, True])
def test_mamba_ssm_signature(grouped):
    inputs = draw(steps=20)
    y, state = by_definition(**(inputs | {"state": torch.zeros_like(inputs["state"])}))
    u, delta, A, B, C, D, z, delta_bias = in_their_layout(inputs).values()
    if grouped:
        B, C = B[:, None], C[:, None]

    def check(B, C):
        ours = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True, True)
        assert_matches(list(ours), [y.mT, state], FLOAT64, "selective_scan_fn")

    check(B, C)
    assert_rejects(lambda C: check(B, C), B)
    assert isinstance(selective_scan_fn(u, delta, A, B, C), torch.Tensor)


@pytest.mark.parametrize("path", [{}, {"use_mambapy": True}], ids=["loop", "mambapy"])
@pytest.mark.parametrize("steps", [1, 3, 100])
@RUNGS
def test_equals_transformers(rung, steps, path):
    """Its Jamba's scan in float32, with the state that it returns."""
    inputs = {name: tensor.detach() for name, tensor in draw(steps=steps, dtype=torch.float32).items()}
    expected = mamba_selective_scan(
        *list(in_their_layout(inputs).values())[:5],
        D=inputs["D"], z=inputs["z"].mT, delta_bias=inputs["delta_bias"],
        delta_softplus=True, return_last_state=True, **path,
    )  # fmt: skip

    def check(inputs):
        y, state = scan(rung, **inputs)
        assert_matches([y.mT, state], list(expected), FLOAT32, "transformers' scan")

    check(inputs | {"state": None})
    assert_rejects(check, inputs, inputs | {"state": None, "B": inputs["C"]})


def test_step_equals_transformers_step():
    inputs = {name: tensor.detach() for name, tensor in draw(steps=1, dtype=torch.float32).items()}
    token = {name: inputs[name][:, 0] for name in ("x", "delta", "B", "C", "z")}
    A, D, bias = (inputs[name] for name in ("A", "D", "delta_bias"))
    ours, theirs = inputs["state"].clone(), inputs["state"].clone()
    y = selective_step(ours, **token, A=A, D=D, delta_bias=bias, delta_softplus=True)
    expected = mamba_selective_state_update(
        theirs, token["x"], token["delta"], A, token["B"], token["C"], D, z=token["z"], dt_bias=bias, dt_softplus=True
    )
    assert_matches([y, ours], [expected, theirs], FLOAT32, "transformers' step")
    assert_rejects(lambda state: assert_matches(state, theirs, FLOAT32), inputs["state"])


BAD = {
    "delta must be (2, 9, 3)": {"delta": torch.zeros(2, 8, 3)},
    "A must be (3, 4)": {"A": torch.zeros(4, 4)},
    "A (c, n)": {"A": torch.zeros(3)},
    "x must be (b, t, c)": {"x": torch.zeros(2, 9)},
    "no time steps": {"x": torch.zeros(2, 0, 3)},
    "B must be (2, 9, 4)": {"B": torch.zeros(2, 9, 5)},
    "C must be (2, 9, 4)": {"C": torch.zeros(1, 9, 4)},
    "D must be (3,)": {"D": torch.zeros(1)},
    "z must be (2, 9, 3)": {"z": torch.zeros(2, 9, 1)},
    "delta_bias must be (3,)": {"delta_bias": torch.zeros(2)},
    "state must be (2, 3, 4)": {"state": torch.zeros(2, 4, 3)},
    "state must be torch.float64 when x is torch.float64": {"state": torch.zeros(2, 3, 4)},
    "segments must be (2, 9)": {"segments": torch.zeros(9, dtype=torch.long)},
    "segments must hold integers": {"segments": torch.zeros(2, 9)},
    "x must hold real floating-point numbers": {"x": torch.zeros(2, 9, 3, dtype=torch.long)},
    "A must hold real floating-point numbers": {"A": torch.zeros(3, 4, dtype=torch.complex64)},
    "scan has no rung 'fast'": {"rung": "fast"},
}


@pytest.mark.parametrize(("message", "wrong"), BAD.items(), ids=BAD)
def test_bad_arguments_are_refused(message, wrong):
    with pytest.raises(ValueError) as raised:
        selective_scan(**(draw() | wrong))
    assert message in str(raised.value)


def test_bad_arguments_of_the_other_forms_are_refused():
    token = {name: tensor[:, 0] if tensor.dim() == 3 else tensor for name, tensor in draw(steps=1).items()}
    token["state"] = draw()["state"].detach()
    selective_step(**token)
    for name, message in ("x", "x must be (b, c)"), ("B", "B must be (2, 4)"), ("state", "state must be (2, 3, 4)"):
        with pytest.raises(ValueError) as raised:
            selective_step(**(token | {name: token[name][..., None]}))
        assert message in str(raised.value)

    theirs = in_their_layout(draw())
    for name, tensor in {"B": theirs["A"], "C": theirs["C"][:, None].expand(2, 2, 4, 9), "u": theirs["u"][0]}.items():
        with pytest.raises(ValueError, match=f"{name} has shape"):
            selective_scan_fn(**(theirs | {name: tensor}))


def test_rungs_share_one_signature():
    assert naive.scan.__annotations__ == parallel.scan.__annotations__
