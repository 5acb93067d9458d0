"""The cross-entropy's kernels: on a GPU where there is one, otherwise in Triton's interpreter."""

import pytest
import torch

from minijamba import fused_loss
from minijamba.loss import IGNORED, cross_entropy
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest value. float64 and float32: a sum over the vocabulary in another order. The others round nothing but
# the gradient, to 11 and 8 bits; the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused_loss, "BLOCK", 4)


def arguments(rows=6, size=11, dtype=torch.float64, ignored=(1, 4)):
    generator = torch.Generator().manual_seed(rows + size)
    logits = 4 * torch.randn(rows, size, generator=generator, dtype=torch.float64)
    targets = torch.randint(size, (rows,), generator=generator)
    targets[[row for row in ignored if row < rows]] = IGNORED
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


def naive(logits, targets):
    return cross_entropy(logits, targets, rung="naive")


def kernel(logits, targets):
    return cross_entropy(logits, targets, rung="fused")


def results(loss, logits, targets, dtype=torch.float64, view=lambda x: x):
    """The loss, and the gradient of three times the loss."""
    logits = logits.detach().to(dtype).requires_grad_()
    loss = loss(view(logits), targets)
    (3 * loss).backward()
    return {"loss": loss.detach(), "gradient": logits.grad}


def assert_equals_naive(logits, targets, dtype=torch.float64, loss=kernel, **options):
    actual = results(loss, logits, targets, dtype, **options)
    assert actual["gradient"].dtype == dtype and actual["loss"].dtype == torch.promote_types(dtype, torch.float32)
    assert_matches(actual, results(naive, logits, targets), TOLERANCES[dtype], "cross-entropy")


@pytest.mark.parametrize("rows, size", [(1, 1), (1, 2), (6, 11), (3, 4096), (2, 5000), (1, 131072)])
def test_equals_the_definition(rows, size):
    assert_equals_naive(*arguments(rows, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, small_blocks):
    given = arguments(dtype=dtype)

    def check(loss):
        assert_equals_naive(*given, dtype, loss)

    check(kernel)
    assert_rejects(check, lambda logits, targets: kernel(logits.flip(1), targets))


def test_wrong_losses_would_be_found(small_blocks):
    def check(loss):
        assert_equals_naive(*arguments(), loss=loss)

    def mean_over_all_rows(logits, targets):
        return kernel(logits, targets) * (targets != IGNORED).sum() / len(targets)

    def gradient_of_the_sum(logits, targets):
        loss = kernel(logits, targets)
        return loss.detach() + (loss - loss.detach()) * (targets != IGNORED).sum()

    def next_target(logits, targets):
        return kernel(logits, torch.where(targets == IGNORED, IGNORED, (targets + 1) % logits.shape[1]))

    def everything_judged(logits, targets):
        return kernel(logits, targets.clamp(min=0))

    def one_block(logits, targets):
        return kernel(torch.cat([logits[:, :8], logits[:, 8:].detach() - 99], dim=1), targets)

    check(kernel)
    assert_rejects(check, mean_over_all_rows, gradient_of_the_sum, next_target, everything_judged, one_block)


def test_no_judged_target_gives_nan_and_no_gradient():
    logits, targets = arguments(3, ignored=(0, 1, 2))

    def check(loss):
        actual = results(loss, logits, targets)
        assert actual["loss"].isnan() and (actual["gradient"] == 0).all()

    check(kernel)
    check(naive)
    assert_rejects(check, lambda logits, targets: kernel(logits, 0 * targets))


def test_a_target_out_of_range_is_not_passed_over():
    logits, targets = arguments()

    def check(wrong):
        assert kernel(logits, torch.where(targets == 3, wrong, targets)).isnan()

    targets[0] = 3
    check(-1)
    check(logits.shape[1])
    assert_rejects(check, 2, IGNORED)


def test_large_and_infinite_logits():
    """Shifted by a constant they mean the same, and what is -inf has no share."""
    logits, targets = arguments()
    expected = results(kernel, logits, targets)

    def without_scaling(logits, targets):
        logarithms = logits.exp().sum(1).log() - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return logarithms[targets != IGNORED].mean()

    def check(loss):
        # The shift costs four digits of sixteen.
        assert_matches(results(loss, logits + 1e4, targets), expected, 1e-10)

    check(kernel)
    assert_rejects(check, without_scaling)
    logits[:, 5:] = -torch.inf
    assert_equals_naive(logits, targets % 5 + torch.where(targets == IGNORED, IGNORED - targets % 5, 0))


def test_any_strides(small_blocks):
    def part(logits):
        return torch.cat([logits, logits.flip(0)], dim=1)[:, : logits.shape[1]]

    def transposed(logits):
        return logits.mT.contiguous().mT

    for view in (part, transposed):
        assert not view(arguments()[0]).is_contiguous()
        assert_equals_naive(*arguments(), view=view)
    assert_rejects(lambda view: assert_equals_naive(*arguments(), view=view), lambda x: part(x.flip(1)))


def test_what_is_kept_for_the_gradient_is_a_number_a_row():
    logits, targets = arguments(dtype=torch.bfloat16)
    logits.requires_grad_()

    def check(loss):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
            loss(logits, targets)
        assert all(tensor.numel() <= len(logits) or tensor.data_ptr() == logits.data_ptr() for tensor in kept)

    check(kernel)
    assert_rejects(check, naive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits_and_fill_their_outputs(dtype, poisoned_memory):
    logits, targets = arguments(dtype=dtype)
    first = results(kernel, logits, targets, dtype)
    assert_matches(results(kernel, logits, targets, dtype), first, 0)
    other = logits.nextafter(logits + 1)
    assert_rejects(lambda logits: assert_matches(results(kernel, logits, targets, dtype), first, 0), other)


def test_gradcheck():
    logits, targets = arguments(3, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(kernel, (logits, targets))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, _: kernel(x, targets) + (x - x.detach()).sum(), (logits, targets))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad((logits**3).sum() + kernel(logits, targets), logits, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    assert_equals_naive(*arguments(), loss=compiled)
    assert_rejects(lambda loss: assert_equals_naive(*arguments(), loss=loss), lambda x, t: compiled(x.flip(1), t))


def test_operators_keep_their_word():
    logits, targets = arguments(3)
    torch.library.opcheck(torch.ops.minijamba.cross_entropy.default, (logits, targets, IGNORED))
    loss, sums, judged = fused_loss._loss(logits, targets, IGNORED)
    backward = torch.ops.minijamba.cross_entropy_backward.default
    torch.library.opcheck(backward, (loss, logits, targets, sums, judged, IGNORED))
