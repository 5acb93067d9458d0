"""The scan's kernels: on a GPU where there is one, otherwise in Triton's interpreter, at sizes to its patience."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

import minijamba as mj
from minijamba import rungs
from minijamba.scan import fused, selective_scan, selective_scan_fn
from minijamba.testing import assert_matches, assert_rejects

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Relative to the norm. float64: sums in another order. float32: the same, over a memory of a hundred steps, through exp
# and log. The others are computed in float32 and round each result to 11 and 8 bits; the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
MANY = 10**6

# Time is cut into chunks, chunks make parts that run side by side, and backward goes through the parts by windows.
# Warps that are wanted and tokens of a window, for 38 steps; and how often each kernel is launched then.
PLANS = {
    "one part": (0, MANY, {"forward": 1, "gradient": 1, "add": 1}),
    "many parts": (MANY, MANY, {"forward": 2, "adjoint": 1, "gradient": 1, "add": 1}),
    "many windows": (0, 16, {"forward": 1, "gradient": 3, "add": 3}),
    "windows in parts": (16, 32, {"forward": 2, "adjoint": 1, "gradient": 2, "add": 2}),
}


def follow(monkeypatch, warps, window):
    changes = {
        "CHUNK": 16,
        "BLOCK": 8,
        "GRADIENT": fused.GRADIENT | {"BLOCK": 8, "AT_ONCE": 2},
        "ADD": fused.ADD | {"DEEP": 2},
        "WARPS": dict.fromkeys(fused.WARPS, warps) | {"adjoint": MANY},
        "WINDOWS": MANY,
        "WINDOW": window,
    }
    for name, value in changes.items():
        monkeypatch.setattr(fused, name, value)
    monkeypatch.setattr(fused, "_processors", lambda device: 1)


@pytest.fixture
def in_parts(monkeypatch):
    """Two parts in 20 steps; in 38 two for backward, in two windows."""
    follow(monkeypatch, warps=16, window=32)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """The interpreter prepares the language anew for every function that a kernel calls, half of its time. Once for a
    kernel is enough."""
    prepare, prepared = getattr(interpreter, "_patch_lang", None), set()

    def prepare_once(function):
        if function.__module__ in prepared:
            return None
        prepared.add(function.__module__)
        scope = prepare(function)
        restore = scope.restore
        scope.restore = lambda: (restore(), prepared.clear())
        return scope

    if hasattr(interpreter, "_LangPatchScope"):
        monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)


def arguments(steps=5, channels=2, states=33, batch=1, dtype=torch.float64, **changes):
    """Steps of about softplus(-4.6) = 0.01 remember a hundred tokens: a lost state shows long after."""
    generator = torch.Generator().manual_seed(steps + channels + states)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    tokens, wide = (batch, steps), torch.promote_types(dtype, torch.float32)
    given = {
        "x": normal(*tokens, channels).to(dtype),
        "delta": normal(*tokens, channels).to(dtype),
        "A": -normal(channels, states).exp().to(wide),
        "B": normal(*tokens, states).to(dtype),
        "C": normal(*tokens, states).to(dtype),
        "D": normal(channels).to(dtype),
        "z": normal(*tokens, channels).to(dtype),
        "delta_bias": (0.3 * normal(channels) - 4.6).to(wide),
        "state": normal(batch, channels, states).to(wide),
    }
    return given | changes


def packing(steps, batch=1):
    """Documents of one token and of a chunk, numbers that return, changes after the first token and at chunks."""
    ids = torch.tensor([7, *[3] * 15, *[7] * 16, 3, *[9] * 5], device=DEVICE)[None, :steps]
    return torch.cat([ids.roll(row, 1) for row in range(batch)])


def at(arguments, steps):
    """The arguments of some steps."""
    over_time = ("x", "delta", "B", "C", "z", "segments")
    return {k: v[:, steps] if k in over_time and v is not None else v for k, v in arguments.items()}


def rounded(value):
    return value.to(torch.bfloat16).to(value.dtype)


def naive(**arguments):
    return selective_scan(**arguments, rung="naive")


def kernel(**arguments):
    return selective_scan(**arguments, rung="fused")


def wave(like):
    """Numbers that every type holds exactly."""
    return ((torch.arange(like.numel(), device=DEVICE) * 37 % 11 - 5) / 4).view(like.shape).to(like.dtype)


def results(scan, given, view=lambda v: v, gradient=wave, softplus=True, segments=None):
    """y, the last state, and the gradient of every argument through both; x, delta, B, C, z and dy may be views."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if value is not None}
    seen = {name: view(leaf) if name in ("x", "delta", "B", "C", "z") else leaf for name, leaf in leaves.items()}
    y, state = scan(**seen, delta_softplus=softplus, segments=segments, return_state=True)
    upstream = [view(gradient(y)), wave(state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream, materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def watch(monkeypatch):
    """The arguments of every launch from now on, by kernel."""
    launches = {}
    for name in "forward", "adjoint", "gradient", "add":
        kernel = getattr(fused, f"_{name}_kernel")

        def run(*args, name=name, kernel=kernel, launch=kernel.run, **options):
            launches.setdefault(name, []).append(dict(zip(kernel.arg_names, args, strict=False)))
            return launch(*args, **options)

        monkeypatch.setattr(kernel, "run", run)

    def every_time(kernel, grid, constants):
        return lambda *arguments: kernel[grid](*arguments, **constants)

    monkeypatch.setattr(fused, "_again", every_time)  # what is launched again does not pass by `run` on a GPU
    return launches


def in_float64(given):
    return {name: None if value is None else value.double() for name, value in given.items()}


def assert_near(actual, expected, tolerances=TOLERANCES):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.isfinite().all(), name
        error = (value.double() - expected[name]).norm()
        assert error <= tolerances[value.dtype] * expected[name].norm(), f"{name}: off by {error:.1e}"


def assert_equals_naive(given, scan=kernel, view=lambda v: v, **options):
    """Against the definition in float64, from the same rounded numbers."""
    assert_near(results(scan, given, view, **options), results(naive, in_float64(given), **options))


SIZES = [(1, 48, 16, 2), (2, 1, 64, 1), (3, 3, 5, 2), (63, 1, 1, 1), (100, 3, 16, 1), (257, 1, 5, 1)]
# bfloat16 B and C of whole tiles and a power of two of states are packed as they are.
CASES = [*((torch.float64, *sizes) for sizes in SIZES), (torch.bfloat16, 16, 3, 8, 2)]
if GPU:
    SIZES = [(63, 48, 64, 2), (257, 3, 1, 2), (4097, 3, 64, 1), (4097, 48, 5, 2), (4097, 8192, 16, 1)]
    CASES += [(dtype, *sizes) for dtype in TOLERANCES for sizes in SIZES]


@pytest.mark.parametrize("dtype, steps, channels, states, batch", CASES)
def test_equals_the_definition(dtype, steps, channels, states, batch):
    assert_equals_naive(arguments(steps, channels, states, batch, dtype))


def changed(**changes):
    """The definition with some arguments exchanged: a name for another, or a function of the value."""

    def wrong(**given):
        new = {k: given[how] if isinstance(how, str) else how(given[k]) for k, how in changes.items()}
        return naive(**(given | new))

    return wrong


def in_pieces(*cuts, scan=naive, carry=lambda state: state):
    """A scan in pieces, each from the state that the one before it returned."""

    def run(state, **given):
        outputs = []
        for start, end in pairwise([0, *cuts, given["x"].shape[1]]):
            y, state = scan(**at(given, slice(start, end)), state=carry(state) if start else state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return run


def gradient_from_the_first(name, size):
    """A gradient that is summed over the first channels or steps only."""

    def wrong(**given):
        y, state = naive(**given)
        rest, _ = naive(**(given | {name: given[name].detach()}))
        first = torch.zeros_like(y, dtype=torch.bool)
        first[:, : size[0], : size[1]] = True
        return torch.where(first, y, rest), state

    return wrong


WRONG = {
    "state dropped": changed(state=torch.zeros_like),
    "state's gradient dropped": changed(state=torch.Tensor.detach),
    "documents run together": changed(segments=torch.zeros_like),
    "B and C exchanged": changed(B="C", C="B"),
    "exp for exp2": changed(A=lambda A: A * math.log(2)),
    "no gate": changed(z=lambda z: torch.full_like(z, 1.2784645427610738)),  # silu(1.278...) = 1
    "no skip": changed(D=torch.zeros_like),
    "bias twice": changed(delta_bias=lambda bias: 2 * bias),
    "lost before the last chunk": in_pieces(32, carry=lambda state: 0.99 * state),
    "no adjoint before the last chunk": in_pieces(32, carry=torch.Tensor.detach),
    "B's gradient from one block": gradient_from_the_first("B", (None, 2)),
    "A's gradient from one part": gradient_from_the_first("A", (16, None)),
}


@pytest.mark.parametrize("warps, window, launches", PLANS.values(), ids=PLANS)
def test_chunks_parts_and_windows_are_seamless(warps, window, launches, monkeypatch):
    follow(monkeypatch, warps, window)
    seen = watch(monkeypatch)
    assert_equals_naive(arguments(38, 3), segments=packing(38))
    assert {name: len(seen[name]) for name in seen} == launches


def test_blocks_and_sequences_are_seamless(in_parts):
    assert_equals_naive(arguments(19, 11, batch=2), segments=packing(19, 2))


def test_sequences_may_be_more_than_tokens_in_a_window(monkeypatch):
    monkeypatch.setattr(fused, "WINDOW", 1)
    assert_equals_naive(arguments(3, batch=2))


def test_backward_takes_sequences_in_groups(monkeypatch):
    """Two and one, where two of them fill the processors: one, which wants 16 warps, and a sequence has 8."""
    follow(monkeypatch, warps=16, window=16)
    walk_back, groups = fused._walk_back, []

    def counted(*tensors):
        groups.append(tensors)
        walk_back(*tensors)

    def first_group_only(*tensors):
        groups.append(tensors)
        if len(groups) == 1:
            walk_back(*tensors)

    def check(walk_back):
        groups.clear()
        monkeypatch.setattr(fused, "_walk_back", walk_back)
        assert_equals_naive(arguments(19, 3, batch=3), segments=packing(19, 3))
        assert len(groups) == 2

    check(counted)
    assert_rejects(check, first_group_only)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_kernels_would_be_found(wrong):
    given, segments = arguments(38, 3), packing(38) if wrong is WRONG["documents run together"] else None
    assert_equals_naive(given, naive, segments=segments)
    assert_rejects(lambda scan: assert_equals_naive(given, scan, segments=segments), wrong)


ALL = ("D", "z", "delta_bias", "state")


@pytest.mark.parametrize(
    "missing, softplus", [*(((name,), True) for name in ALL), (ALL, True), (ALL, False), (("D", "z"), False)]
)
def test_arguments_can_be_left_out(missing, softplus):
    whole = arguments()
    if not softplus:
        whole |= {"delta": whole["delta"].abs() / 9, "delta_bias": whole["delta_bias"].abs() / 99}
    given = whole | dict.fromkeys(missing)

    def check(scan):
        assert_equals_naive(given, scan, softplus=softplus)

    def not_left_out(**given):
        return naive(**(given | {name: whole[name] for name in missing}))

    def other_end(delta_softplus, **given):
        return naive(delta_softplus=not delta_softplus, **given)

    check(kernel)
    assert_rejects(check, not_left_out, other_end)


@pytest.mark.parametrize("cuts", [(1, 19), (16,), (2, 7, 17)], ids=str)
def test_every_split_carries_the_state_and_its_gradient(in_parts, cuts):
    given = arguments(20)
    whole = results(naive, given)

    def check(scan, carry=lambda state: state):
        assert_near(results(in_pieces(*cuts, scan=scan, carry=carry), given), whole)

    check(kernel)
    for carry in torch.zeros_like, torch.Tensor.detach, torch.Tensor.bfloat16:
        assert_rejects(lambda carry: check(naive, lambda state: carry(state).double()), carry)


def test_packed_documents_equal_separate_runs(in_parts):
    """The first continues the incoming state, the others start from zero."""
    given, segments, cuts = arguments(38), packing(38), (1, 16, 32, 33)
    expected = results(in_pieces(*cuts, carry=torch.zeros_like), given)

    def check(segments, scan=kernel):
        assert_near(results(scan, given, segments=segments), expected)

    check(segments)
    assert_rejects(lambda wrong: check(wrong, naive), None, segments.roll(1, 1), segments.flip(1))


def test_padding_is_a_step_of_length_zero(in_parts):
    given = arguments(26)
    padded = torch.zeros(26, dtype=torch.bool, device=DEVICE)
    padded[:3] = padded[14:19] = padded[25:] = True

    def alone(**given):
        return naive(**at(given, ~padded))

    def with_padding(scan, length=-torch.inf):
        def run(delta, **given):
            y, state = scan(delta=delta.masked_fill(padded[:, None], length), **given)
            return y[:, ~padded], state

        return run

    def check(scan):
        assert_near(results(scan, given), results(alone, given))

    check(with_padding(kernel))
    assert_rejects(check, with_padding(naive, 0.0), with_padding(naive, -20.0))


@pytest.mark.parametrize("dtype, packed", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_extreme_lengths_stay_finite(in_parts, dtype, packed):
    """Both ends of the softplus, decays of 0 and 1, and padding, next to each other, in and between documents."""
    extremes = torch.tensor([-60, 60, -torch.inf, 9, 0, -1e4, 4.6, -15, 15, -torch.inf, 30], device=DEVICE)
    given = arguments(22, dtype=dtype)
    given["delta"] = torch.stack([extremes.repeat(2), extremes.repeat_interleave(2)], dim=-1)[None].to(dtype)
    given["A"] = -torch.logspace(-6, 3, 66, device=DEVICE).view(2, 33)
    assert_equals_naive(given, segments=torch.arange(22, device=DEVICE)[None] // 3 if packed else None)

    def divided_by_products(x, delta, A, B, C, D, z, delta_bias, state, **options):
        delta = F.softplus(delta + delta_bias)
        product = torch.exp(delta[..., None] * A).cumprod(1)
        states = product * (state[:, None] + ((delta * x)[..., None] * B[:, :, None] / product).cumsum(1))
        return ((states * C[:, :, None]).sum(-1) + D * x) * F.silu(z), states[:, -1]

    assert_equals_naive(arguments(), divided_by_products)
    assert_rejects(lambda scan: assert_equals_naive(in_float64(given), scan), divided_by_products)


def test_padding_keeps_every_bit_of_the_state(in_parts):
    given = arguments(22, dtype=torch.float32)

    def check(length):
        lengths = {"delta": torch.full_like(given["delta"], length)}
        _, state = kernel(**(given | lengths), delta_softplus=True, return_state=True)
        assert_matches(state, given["state"], 0, "state")

    check(-torch.inf)
    assert_rejects(check, -9.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_types_are_computed_in_float32(in_parts, dtype):
    given, segments = arguments(20, dtype=dtype), packing(20)
    expected = results(naive, in_float64(given), segments=segments)

    def check(actual):
        assert_near(actual, expected)

    check(results(kernel, given, segments=segments))
    assert_rejects(check, results(changed(state=rounded), given, segments=segments))


@pytest.mark.parametrize(
    "types",
    [{"x": torch.bfloat16}, {"delta": torch.bfloat16, "B": torch.float16}, {"C": torch.bfloat16, "z": torch.float16}],
)
def test_mixed_types_keep_their_precision(types):
    """Each gradient is as exact as its argument's type."""
    given = arguments(dtype=torch.float32)
    given |= {name: given[name].to(dtype) for name, dtype in types.items()}
    assert_equals_naive(given)
    assert_rejects(lambda scan: assert_equals_naive(given, scan), changed(A=rounded))


def time_last(v):
    """The layout of mamba-ssm, (b, c, t) in memory."""
    return v.mT.contiguous().mT


def half_of_a_projection(v):
    return torch.cat([v, v.flip(0)], dim=-1).chunk(2, dim=-1)[0]


def every_other(v):
    return v.repeat_interleave(2, dim=1)[:, ::2].repeat_interleave(3, dim=2)[:, :, ::3]


@pytest.mark.parametrize("view", [time_last, half_of_a_projection, every_other])
def test_any_strides_without_a_copy(view, monkeypatch):
    launches, passed = watch(monkeypatch), {}

    def check(prepare):
        def scan(**given):
            passed.update(given)
            return kernel(**{k: prepare(v) if k in ("x", "delta", "z") else v for k, v in given.items()})

        assert_equals_naive(arguments(), scan, view)
        for launch in launches["forward"][-1], launches["gradient"][-1]:
            for name in "x", "delta", "z":
                assert not passed[name].is_contiguous()
                assert launch[name].data_ptr() == passed[name].data_ptr()
                assert launch[name].stride() == passed[name].stride()

    check(lambda v: v)
    assert_rejects(check, torch.clone)


def test_gradient_of_a_sum_is_not_copied(monkeypatch):
    """It comes as one number with strides of zero."""
    launches = watch(monkeypatch)

    def check(gradient):
        assert_equals_naive(arguments(), gradient=gradient)
        assert launches["gradient"][-1]["dy"].stride() == (0, 0, 0)

    check(lambda y: torch.ones((), dtype=y.dtype, device=DEVICE).expand(y.shape))
    assert_rejects(check, torch.ones_like)


def test_offsets_pass_31_bits(tmp_path):
    """Channels 2^30 numbers apart, as with time last in a long sequence. On a CPU, memory is a file full of holes."""
    far, size = 2**30 + 64, 2**32 + 999
    if GPU:
        memory = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=torch.bfloat16)

    def spread(v, place):
        """From the middle on, so that an offset that wraps around finds zeros before it."""
        return memory.as_strided(v.shape, (0, 1, far), 2**31 + place).copy_(v)

    def check(name, scan=kernel):
        near = arguments(3, 3, dtype=torch.bfloat16)
        given = near | ({} if name == "dy" else {name: spread(near[name], 0)})
        actual = results(scan, given, gradient=lambda y: spread(wave(y), 0) if name == "dy" else wave(y))
        assert_near(actual, results(naive, in_float64(near)))

    def wraps_around(x, **given):
        at = torch.arange(3)[None, :, None] + (torch.arange(3) * far + 2**31) % 2**32 - 2**31
        return naive(x=x + memory[2**31 + at] - x.detach(), **given)

    for name in "x", "delta", "z", "dy":
        check(name)
    assert_rejects(lambda scan: check("x", scan), wraps_around)


def test_outputs_are_written_in_full_and_nothing_else_is(in_parts, monkeypatch):
    """All memory comes as NaN, or zeros where those are asked for, in the middle of sentinels."""
    given, segments, buffers = arguments(19, 11), packing(19), []
    expected = results(naive, given, segments=segments)

    def guarded(shape, dtype, value):
        size = math.prod(shape)
        buffer = torch.full((size + 64,), 7.0, dtype=dtype, device=DEVICE)
        buffer[32 : 32 + size] = value
        buffers.append(buffer)
        return buffer[32 : 32 + size].view(shape)

    def new(value, original):
        def make(tensor, *shape, dtype=None, **where):
            if where or not tensor.is_floating_point():
                return original(tensor, *shape, dtype=dtype or tensor.dtype, **where)
            return guarded(torch.empty(*shape, device="meta").shape, dtype or tensor.dtype, value)

        return make

    monkeypatch.setattr(torch, "empty_like", lambda tensor: guarded(tensor.shape, tensor.dtype, torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", new(torch.nan, torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_zeros", new(0.0, torch.Tensor.new_zeros))
    inputs = {name: tensor.clone() for name, tensor in given.items()}
    *tensors, state = inputs.values()
    y, last, saved = fused._forward(*tensors, True, state, segments, True)
    gradients = fused._backward(*tensors, True, segments, saved, wave(y), wave(last))
    monkeypatch.undo()

    def check(gradients, buffers):
        names = ["y", "state", *(f"d{name}" for name in given)]
        assert_near(dict(zip(names, [y, last, *gradients], strict=True)), expected)
        for buffer in buffers:
            assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()

    check(gradients, buffers)
    assert_matches(inputs, given, 0, "inputs")
    assert len(buffers) > 10
    unwritten = gradients[0].clone()
    unwritten[0, -1, -1] = torch.nan
    assert_rejects(lambda wrong: check(*wrong), ((unwritten, *gradients[1:]), []), (gradients, [buffers[0].roll(1)]))


def test_two_runs_give_the_same_bits(monkeypatch):
    if not GPU:
        follow(monkeypatch, warps=MANY, window=32)
    steps, channels = (4097, 1024) if GPU else (18, 3)
    given = arguments(steps, channels, dtype=torch.float32)
    first = results(kernel, given)

    def check(given):
        assert_matches(results(kernel, given), first, 0)

    check(given)
    assert_rejects(check, given | {"x": given["x"].nextafter(given["x"] + 1)})


def test_gradcheck():
    given = arguments(2, 1)
    segments = torch.tensor([[0, 1]], device=DEVICE)

    def check(scan):
        def run(*tensors):
            arguments = dict(zip(given, tensors, strict=True))
            return scan(**arguments, delta_softplus=True, segments=segments, return_state=True)

        leaves = [value.requires_grad_() for value in given.values()]
        return torch.autograd.gradcheck(run, leaves, fast_mode=True, raise_exception=False)

    assert check(kernel)
    assert not check(changed(B=torch.Tensor.detach))


def test_differentiable_once():
    def twice(rung):
        given = {name: value.requires_grad_() for name, value in arguments(2, 1).items()}
        y = selective_scan(**given, delta_softplus=True, rung=rung)
        (dx,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
        torch.autograd.grad(dx.square().sum() + given["B"].sum(), given["B"])  # has a graph without the scan, too

    twice("naive")
    with pytest.raises(RuntimeError, match="the fused scan .* create_graph=True: pass rung='naive'"):
        twice("fused")


@pytest.mark.parametrize("backend, options", [("eager", {}), ("aot_eager", {"z": None})])
def test_compiles_into_one_graph(backend, options):
    torch.compiler.reset()
    given, segments = arguments(3, **options), packing(3)
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    actual = results(compiled, given, time_last, segments=segments)
    assert_near(actual, results(naive, given, segments=segments))
    assert_rejects(lambda wrong: assert_near(actual, wrong), results(naive, given))


def test_operators_keep_their_word():
    """Schema, autograd and shapes without data, as torch.library tests them."""
    given, segments = arguments(3), packing(3)
    given |= {name: time_last(given[name]) for name in ("x", "delta", "z")}
    *tensors, state = given.values()
    y, last, saved = fused._forward(*tensors, True, state, segments, True)
    forward = (*(value.requires_grad_() for value in tensors), True, state.requires_grad_(), segments, True)
    torch.library.opcheck(torch.ops.minijamba.selective_scan.default, forward)
    backward = (*(value.detach() for value in tensors), True, segments, saved, wave(y), wave(last))
    torch.library.opcheck(torch.ops.minijamba.selective_scan_backward.default, backward)
    without = (*backward[:5], None, None, None, False, None, *backward[10:])
    torch.library.opcheck(torch.ops.minijamba.selective_scan_backward.default, without, test_utils="test_faketensor")


def drop_in(x, delta, A, B, C, D, z, delta_bias, delta_softplus, return_state, segments):
    """selective_scan_fn as if it were selective_scan."""
    u, delta, B, C, z = (v.mT for v in (x, delta, B, C, z))
    with mj.use_rung("fused"):
        y, state = selective_scan_fn(
            u, delta, A, B[:, None], C[:, None], D, z, delta_bias, delta_softplus, return_last_state=return_state
        )
    return y.mT, state


@pytest.mark.parametrize("steps, dtype", [(128, torch.float32), (256, torch.float16), (372, torch.bfloat16)])
def test_agrees_with_mamba_ssms_published_cases(steps, dtype):
    """Its parameters: 8 states, time last, one group; everything present; steps of 0.7 to 1.3, rates of -0.5 to 0."""
    generator = torch.Generator().manual_seed(steps)
    given = arguments(steps, 4, 8, batch=2 if GPU else 1, dtype=dtype)
    del given["state"]
    for name, scale in ("A", -0.5), ("delta", 0.5), ("delta_bias", 0.5):
        uniform = scale * torch.rand(given[name].shape, generator=generator)
        given[name] = uniform.to(DEVICE, given[name].dtype)
    options = {"delta_softplus": True, "segments": None, "return_state": True}
    y, state = drop_in(**given, **options)

    def check(scan):
        expected, last = scan(**in_float64(given), **options)
        assert_near({"y": y, "state": state}, {"y": expected, "state": last})

    check(naive)
    assert_rejects(check, WRONG["B and C exchanged"], WRONG["no skip"], changed(delta_bias=torch.zeros_like))
    assert_equals_naive(given if GPU else at(given, slice(9)), drop_in, time_last)


@pytest.fixture
def model(hybrid, long_memory):
    return long_memory(mj.Jamba(replace(hybrid, hidden_size=8, mamba_d_state=33))).double().to(DEVICE)


@pytest.fixture
def wherever_there_is_a_kernel(monkeypatch):
    """Kernels in the interpreter, too; what has none says so, once, on a GPU."""
    monkeypatch.setattr(rungs, "_told", {"moe"})
    with mj.use_rung("fused"):
        yield


def tokens(batch, steps):
    return torch.randint(1, 41, (batch, steps), generator=torch.Generator().manual_seed(steps)).to(DEVICE)


def logits_and_gradients(model, mask, segments):
    """Of all real tokens and of every parameter."""
    logits = model(tokens(2, 7), mask=mask, segments=segments)[mask]
    gradients = torch.autograd.grad((logits * wave(logits)).sum(), list(model.parameters()), materialize_grads=True)
    names = (name for name, _ in model.named_parameters())
    return {"logits": logits} | dict(zip(names, gradients, strict=True))


def test_whole_jamba_is_the_same(model, wherever_there_is_a_kernel, monkeypatch):
    """With padding and packing."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool, device=DEVICE)
    documents = torch.tensor([[3, 3, 5, 5, 5, 3, 3], [1, 1, 1, 1, 2, 2, 2]], device=DEVICE)
    with mj.use_rung("parallel"):
        expected = logits_and_gradients(model, mask=real, segments=documents)

    def check():
        assert_near(logits_and_gradients(model, mask=real, segments=documents), expected)

    launches = watch(monkeypatch)
    check()
    assert launches.keys() >= {"forward", "gradient"}
    names = inspect.signature(fused.scan).parameters
    for wrong in WRONG["B's gradient from one block"], WRONG["documents run together"]:

        def scan(*args, wrong=wrong):
            return wrong(**dict(zip(names, args, strict=True)), return_state=True)

        monkeypatch.setattr(fused, "scan", scan)
        with pytest.raises(AssertionError, match="off by"):
            check()


@torch.no_grad()
def test_jamba_continues_from_its_cache(model, wherever_there_is_a_kernel):
    ids = tokens(2, 9)
    with mj.use_rung("parallel"):
        expected, replies = model(ids), mj.generate(model, ids, max_new_tokens=2)

    def check(forget=lambda state: state):
        cache = model.new_cache(2)
        outputs = []
        for start, end in pairwise([0, 4, 5, 9]):
            outputs.append(model(ids[:, start:end], cache=cache))
            for layer in cache.layers:
                if hasattr(layer, "state"):
                    forget(layer.state)
        assert_matches(torch.cat(outputs, dim=1), expected, 1e-12, "logits")

    check()
    assert_rejects(check, torch.Tensor.zero_)
    assert_matches(mj.generate(model, ids, max_new_tokens=2), replies, 0, "tokens")


def test_without_a_gpu_or_the_interpreter_it_says_so(monkeypatch):
    given = {name: value.cpu() for name, value in arguments().items()}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no rung 'fused' here; kernels need tensors on a GPU .* TRITON_INTERPRET=1"):
        kernel(**given)
