import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minijamba import fused_glu, fused_norm
from minijamba.mlp import MLP
from minijamba.norm import RMSNorm
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

# Kernels run on a GPU where there is one, otherwise in Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float64, sums of at most some tens of terms.
FLOAT64 = 1e-14
# Of the largest value, for kernels. Sums of some thousand terms in another order; float16 and bfloat16 round results,
# gradients and what meets the norm's weight to 11 and 8 bits, and the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))

    def check(rms):
        assert_matches(norm(torch.tensor([3.0, 4.0]).double()), [2 * 3 / rms, 3 * 4 / rms], FLOAT64, "norm")

    check(math.sqrt(12.5 + 0.5))
    assert_rejects(check, math.sqrt(12.5) + 0.5, math.sqrt(25 + 0.5))


def test_rms_norm_takes_the_mean_in_float32():
    """Squares of half precision overflow from 256 on, and a mean in bfloat16 has 8 bits."""

    def check(norm):
        x = 300 * torch.ones(4, dtype=torch.float16)
        assert norm(x).dtype == torch.float16
        assert_matches(norm(x), torch.ones(4), 1e-3, "float16")

    def in_half_precision(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    check(RMSNorm(4).half())
    assert_rejects(check, in_half_precision)


def test_rms_norm_rounds_before_the_weight():
    """As transformers does: the normalised values go back to the type of x, then meet the weight."""
    norm = RMSNorm(64).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(64))
    x = torch.randn(32, 64).to(torch.bfloat16)
    normalised = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)

    def check(expected):
        assert_matches(norm(x), expected, 0, "norm")

    check(norm.weight * normalised.to(torch.bfloat16))
    assert_rejects(check, (norm.weight.float() * normalised).to(torch.bfloat16))


def test_mlp_is_its_formula(hybrid, long_memory):
    mlp = long_memory(MLP(replace(hybrid, hidden_size=4, intermediate_size=5))).double()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def check(expected):
        assert_matches(mlp(x), expected, FLOAT64, "mlp")

    check((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert_rejects(
        check,
        ((x @ gate.T) * F.silu(x @ up.T)) @ down.T,
        (F.gelu(x @ gate.T) * (x @ up.T)) @ down.T,
    )


def values(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def results(function, *arguments, dtype=torch.float64, autocast=False):
    """The value of a function and all its gradients, the arguments being given in dtype."""
    leaves = [argument.detach().to(dtype).requires_grad_() for argument in arguments]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        y = function(*leaves)
    y.backward(torch.linspace(-9, 9, y.numel(), dtype=torch.float64, device=DEVICE).sin().view(y.shape).to(y.dtype))
    return {"y": y.detach(), "gradients": [leaf.grad for leaf in leaves]}


def norm_on(rung, eps=1e-3):
    def norm(x, weight):
        module = RMSNorm(len(weight), eps)
        del module.weight
        module.weight = weight
        with use_rung(rung):
            return module(x)

    return norm


@pytest.mark.parametrize("shape", [(1, 3), (3, 7, 20), (9, 256), (2, 768), (3, 8192)])
@pytest.mark.parametrize("programs", [1, 512])
def test_norm_kernel_equals_the_definition(shape, programs, monkeypatch):
    monkeypatch.setattr(fused_norm, "PROGRAMS", programs)
    x, weight = values(*shape), values(shape[-1], seed=1)
    expected = results(norm_on("naive"), x, weight)

    def check(norm):
        assert_matches(results(norm, x, weight), expected, TOLERANCES[torch.float64], "norm")

    def weight_gradient_of_some_rows(x, weight):
        last = x.detach().clone()
        last[..., -1, :] = x[..., -1, :]
        return norm_on("fused")(x, weight.detach()) + (y := norm_on("fused")(last, weight)) - y.detach()

    check(norm_on("fused"))
    check(lambda x, weight: norm_on("fused")(x.mT.contiguous().mT, weight))
    assert_rejects(check, norm_on("fused", eps=1e-2))
    if x.numel() > x.shape[-1]:
        assert_rejects(check, weight_gradient_of_some_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_kernel_in_half_precision(dtype):
    x, weight = values(20, 64, dtype=dtype), values(64, dtype=dtype, seed=1)

    def check(norm):
        actual = results(norm, x, weight, dtype=dtype)
        assert actual["y"].dtype == dtype and all(gradient.dtype == dtype for gradient in actual["gradients"])
        assert_matches(actual, results(norm_on("naive"), x, weight), TOLERANCES[dtype], "norm")

    check(norm_on("fused"))
    assert_rejects(check, lambda x, weight: norm_on("fused")(x, weight.flip(0)))


def test_norm_kernel_writes_what_the_next_product_reads():
    """Under autocast: bfloat16 for a stream in float32, with gradients in the dtypes of what they belong to."""
    x, weight = values(20, 64), values(64, seed=1)

    def check(dtype, rung="fused", wanted=torch.bfloat16):
        actual = results(norm_on(rung), x, weight, dtype=dtype, autocast=True)
        assert actual["y"].dtype == wanted
        assert all(gradient.dtype == dtype for gradient in actual["gradients"])
        assert_matches(actual, results(norm_on("naive"), x, weight), TOLERANCES[wanted], "norm")

    check(torch.float32)
    check(torch.bfloat16)
    check(torch.float64, wanted=torch.float64)  # which autocast leaves alone
    assert_rejects(lambda rung: check(torch.float32, rung), "naive")


def sum_on(rung, eps=1e-3):
    """x + y and its norm, side by side as one tensor of the norm's dtype."""

    def of_sum(x, y, weight):
        module = RMSNorm(len(weight), eps)
        del module.weight
        module.weight = weight
        with use_rung(rung):
            h, normed = module.of_sum(x, y)
        assert h.dtype == torch.promote_types(x.dtype, y.dtype)
        return torch.cat([h.to(normed.dtype), normed])

    return of_sum


@pytest.mark.parametrize("programs", [1, 512])
def test_norm_of_sum(programs, monkeypatch):
    """The definition by hand, and the kernel against it."""
    monkeypatch.setattr(fused_norm, "PROGRAMS", programs)
    x, y, weight = values(4, 5, 20), values(4, 5, 20, seed=2), values(20, seed=1)
    expected = results(lambda x, y, weight: torch.cat([x + y, norm_on("naive")(x + y, weight)]), x, y, weight)

    def check(of_sum):
        assert_matches(results(of_sum, x, y, weight), expected, TOLERANCES[torch.float64], "norm of a sum")

    def without(name):
        def of_sum(x, y, weight):
            h, normed = sum_on("fused")(x, y, weight).chunk(2)
            return torch.cat([h.detach(), normed] if name == "stream" else [h, normed.detach()]) + 0 * (
                x.sum() + weight.sum()
            )

        return of_sum

    check(sum_on("naive"))
    check(sum_on("fused"))
    check(lambda x, y, weight: sum_on("fused")(x.mT.contiguous().mT, y.mT.contiguous().mT, weight))
    assert_rejects(check, without("stream"), without("norm"), lambda x, y, weight: sum_on("fused")(x, -y, weight))


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_norm_of_sum_under_autocast(stream):
    """The stream keeps its dtype; every gradient has that of what it belongs to."""
    leaves = [values(20, 64, dtype=stream), values(20, 64, dtype=torch.bfloat16, seed=2), values(64, seed=1).to(stream)]
    expected = results(sum_on("naive"), *leaves)

    def check(sign):
        x, y, weight = (leaf.detach().requires_grad_() for leaf in leaves)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = sum_on("fused")(x, sign * y, weight)
        assert found.dtype == torch.bfloat16
        found.backward(torch.linspace(-9, 9, found.numel(), dtype=torch.float64).sin().view(found.shape).to(found))
        assert_matches(found, expected["y"], TOLERANCES[torch.bfloat16], "h and its norm")
        for leaf, gradient in zip((x, y, weight), expected["gradients"], strict=True):
            assert leaf.grad.dtype == leaf.dtype
            assert_matches(leaf.grad, gradient, TOLERANCES[torch.bfloat16], "gradient")

    check(1)
    assert_rejects(check, -1)


@pytest.mark.parametrize("function", [norm_on("fused"), fused_glu.gated], ids=["norm", "swiglu"])
def test_kernels_give_the_same_bits_twice(function):
    x = values(50, 64, dtype=torch.float32)
    other = values(64, seed=1) if function is not fused_glu.gated else x.flip(0)
    first = results(function, x, other, dtype=torch.float32)

    def check(x):
        assert_matches(results(function, x, other, dtype=torch.float32), first, 0)

    check(x)
    assert_rejects(check, x.nextafter(x + 1))


def plain_swiglu(gate, up):
    return F.silu(gate) * up


def plain_geglu(gate, up):
    return F.gelu(gate) * up


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1,), (2, 3, 7), (70, 130), (3, 2500)])
@pytest.mark.parametrize(
    "act, plain, other", [("silu", plain_swiglu, plain_geglu), ("gelu", plain_geglu, plain_swiglu)]
)
def test_gated_kernel_equals_the_definition(act, plain, other, shape, dtype):
    gate, up = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=1)
    expected = results(plain, gate, up)

    def check(gated):
        actual = results(gated, gate, up, dtype=dtype)
        assert all(value.dtype == dtype for value in (actual["y"], *actual["gradients"]))
        assert_matches(actual, expected, TOLERANCES[dtype], "gated")

    check(lambda gate, up: fused_glu.gated(gate, up, act))
    assert_rejects(
        check,
        lambda gate, up: fused_glu.gated(up, gate, act),
        lambda gate, up: fused_glu.gated(gate, up.detach(), act) + 0 * up,
        other,
    )


def test_gelu_kernel_is_the_one_by_the_normal_distribution():
    gate, up = values(70, 130), values(70, 130, seed=1)

    def check(geglu):
        assert_matches(results(geglu, gate, up), results(plain_geglu, gate, up), 1e-13, "geglu")

    check(lambda gate, up: fused_glu.gated(gate, up, "gelu"))
    assert_rejects(check, lambda gate, up: F.gelu(gate, approximate="tanh") * up)


def test_swiglu_kernel_reads_the_halves_of_one_product(monkeypatch):
    """Without a copy: the kernels see the stride of the whole rows."""
    both, seen, launch = values(4, 3, 10), [], fused_glu._forward.run

    def run(*args, **options):
        seen.append(args[1])
        return launch(*args, **options)

    monkeypatch.setattr(fused_glu._forward, "run", run)

    def check(swiglu):
        assert_matches(results(swiglu, both), results(lambda both: plain_swiglu(*both.chunk(2, -1)), both), 1e-13)

    check(lambda both: fused_glu.gated(*both.chunk(2, dim=-1)))
    assert seen == [10]
    check(lambda both: fused_glu.gated(*both.mT.contiguous().mT.chunk(2, dim=-1)))
    assert_rejects(check, lambda both: fused_glu.gated(*both.chunk(2, dim=-1)[::-1]))


def test_operators_keep_their_word():
    x, y, weight = values(3, 5), values(3, 5, seed=1), values(5)
    torch.library.opcheck(torch.ops.minijamba.gated.default, (x, y, "gelu"))
    torch.library.opcheck(torch.ops.minijamba.gated_backward.default, (x, x, y, "gelu"))
    torch.library.opcheck(torch.ops.minijamba.add_rms_norm.default, (x, y, weight, 1e-3, torch.float64))
    for dtype in (torch.float64, torch.float32):
        given = x, y, x, weight, 1e-3, torch.float64, dtype
        torch.library.opcheck(torch.ops.minijamba.add_rms_norm_backward.default, given)


def test_kernels_have_true_gradients_and_no_second_ones():
    x, weight = values(3, 5).requires_grad_(), values(5, seed=1).requires_grad_()
    gate, up = values(3, 5).requires_grad_(), values(3, 5, seed=1).requires_grad_()
    cases = (norm_on("fused"), (x, weight)), (sum_on("fused"), (x, gate, weight)), (fused_glu.gated, (gate, up))
    cases += ((lambda gate, up: fused_glu.gated(gate, up, "gelu"), (gate, up)),)
    for function, arguments in cases:
        assert torch.autograd.gradcheck(function, arguments)
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda a, *b, run=function: run(a, *b) + (a - a.detach()).sum(), arguments)
        first = arguments[0]
        (gradient,) = torch.autograd.grad(function(*arguments).sum() + (first**3).sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modules_with_kernels_compile_into_one_graph(backend, hybrid, long_memory):
    class Sum(RMSNorm):
        def forward(self, x):
            return torch.cat(self.of_sum(x, x.sin()))

    x = values(2, 3, 16)
    for module in (RMSNorm(16), Sum(16), MLP(hybrid), MLP(replace(hybrid, hidden_act="gelu", mlp_bias=True))):
        torch.compiler.reset()
        module = long_memory(module).double().to(DEVICE)
        compiled = torch.compile(module, fullgraph=True, backend=backend)

        def run(function, rung, module=module):
            module.zero_grad()
            with use_rung(rung):
                found = results(function, x)
            return found | {name: parameter.grad for name, parameter in module.named_parameters()}

        expected = run(module, "naive")

        def check(function, expected=expected, run=run):
            assert_matches(run(function, "fused"), expected, 1e-12)

        check(compiled)
        assert_rejects(check, lambda x, compiled=compiled: compiled(x.flip(0)))
