"""Part 5: the Mamba mixer: convolution with its window, inner norms, scan, gate."""

import adapters
import torch
import torch.nn.functional as F
from judge import CONFIG, EXACT, draw, filled, given, in_pieces, points

from minijamba.cache import Layout, MambaState
from minijamba.conv import causal_conv
from minijamba.mamba import Mamba
from minijamba.norm import RMSNorm
from minijamba.rungs import use_rung
from minijamba.scan import selective_scan
from minijamba.testing import assert_matches

D, C, N = CONFIG.hidden_size, CONFIG.d_inner, CONFIG.mamba_d_state
R, W = CONFIG.mamba_dt_rank, CONFIG.mamba_d_conv


def conv(x, weight, bias, state=None, **options):
    return causal_conv(x, weight, bias, state=state, return_state=True, rung="naive", **options)


def mamba_with(own, x, norms=True, inner=F.silu, gate=F.silu, step=F.softplus, bias=True, negative=True, swapped=False):
    """The reference's equations, of which one can be changed."""
    x, z = own.in_proj(x).chunk(2, dim=-1)
    x, z = (z, x) if swapped else (x, z)
    x = inner(conv(x, own.conv1d.weight[:, 0], own.conv1d.bias, activation=False)[0])
    selected = own.x_proj(x).split(own.sizes, dim=-1)
    delta, B, C = (norm(part) for norm, part in zip(own.norms, selected, strict=True)) if norms else selected
    delta = step(F.linear(delta, own.dt_proj.weight, own.dt_proj.bias if bias else None))
    A = -own.A_log.exp() if negative else own.A_log
    return own.out_proj(selective_scan(x, delta, A, B, C, own.D, rung="naive") * gate(z))


def carried(own, x, lengths, *kept):
    """The reference over pieces, of whose cache only some parts are kept from call to call."""
    cache, found = MambaState(x.new_zeros(len(x), W - 1, C), x.new_zeros(len(x), C, N)), []
    for piece in x.split(lengths, dim=1):
        found.append(own(piece, Layout(), cache))
        cache = MambaState(**{name: part if name in kept else 0 * part for name, part in vars(cache).items()})
    return torch.cat(found, dim=1)


@points(4)
def test_values_of_the_convolution():
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    y, _ = adapters.run_conv(x, weight, bias, None)
    future = F.pad(x, (0, 0, 0, 3))
    wrong = {
        "SiLU after the convolution is missing": conv(x, weight, bias, activation=False)[0],
        "your taps are in reverse: weight[:, w-1] belongs to the token itself": conv(x, weight.flip(1), bias)[0],
        "it looks ahead: pad w-1 zeros in front, and none behind": conv(future, weight, bias)[0][:, 3:],
        "the token itself is left out: y_t sees x_t": conv(F.pad(x, (0, 0, 1, 0)), weight, bias)[0][:, :-1],
        "the bias is missing": conv(x, weight, None)[0],
    }
    assert_matches(y, conv(x, weight, bias)[0], EXACT, "y", wrong)


@points(3)
def test_the_window_of_the_convolution():
    """It holds the last w-1 inputs, also when a call is shorter than that."""
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    whole, _ = conv(x, weight, bias)
    for lengths in [5, 4], [1, 2, 6], [1] * 9:
        outputs, state, read = [], None, 0
        for piece in x.split(lengths, dim=1):
            before, kept = state, None if state is None else state.clone()
            y, state = adapters.run_conv(piece, weight, bias, before)
            assert kept is None or torch.equal(kept, before), "your convolution writes into the window it was given"
            outputs, read = [*outputs, y], read + piece.shape[1]
            expected = F.pad(x[:, :read], (0, 0, 3, 0))[:, -3:]
            wrong = {
                "it holds outputs: keep the inputs of the convolution": F.pad(whole[:, :read], (0, 0, 3, 0))[:, -3:]
            }
            assert_matches(state, expected, EXACT, f"the window after {read} tokens in pieces of {lengths}", wrong)
        alone = torch.cat([conv(piece, weight, bias)[0] for piece in x.split(lengths, dim=1)], dim=1)
        wrong = {"each call starts with zeros in its window: put the state in front": alone}
        assert_matches(torch.cat(outputs, dim=1), whole, EXACT, f"y in pieces of {lengths}", wrong)


@points(2)
def test_norm():
    own, x = filled(RMSNorm(7)), 3e-3 * draw(2, 4, 7, seed=50) + 1e-3
    yours = given(adapters.norm(7), own)
    square = x.square()
    wrong = {
        "the weight is left out": own(x) / own.weight,
        "eps is left out": own.weight * x / square.mean(-1, keepdim=True).sqrt(),
        "eps belongs under the root": own.weight * x / (square.mean(-1, keepdim=True).sqrt() + 1e-6),
        "divide by the root of the mean of the squares, not of their sum":
            own.weight * x / (square.sum(-1, keepdim=True) + 1e-6).sqrt(),
        "that is LayerNorm: nothing is subtracted here": F.layer_norm(x, (7,), own.weight, None, 1e-6),
    }  # fmt: skip
    assert_matches(yours(x), own(x), EXACT, "norm", wrong)


@points(2)
def test_the_first_steps_are_short():
    delta = F.softplus(adapters.initial_bias(4000).double())
    assert delta.shape == (4000,), f"the bias has shape {tuple(delta.shape)}, not (c,) = (4000,)"
    said = f"softplus(bias) reaches from {delta.min():.2g} to {delta.max():.2g}, not from 0.001 to 0.1"
    # a per cent of room, more than float32 rounds a bias of -7 by
    assert delta.min() > 0.00099 and delta.max() < 0.101 and delta.max() > 0.09, said
    below = (delta < 0.01).double().mean()
    # of 4000 fair draws the share is off by 0.008 at one standard deviation
    assert abs(below - 0.5) < 0.04, f"{below:.0%} of the steps are below 0.01; log-uniform are half of them"


@points(5)
def test_the_mixer():
    own, x = filled(Mamba(CONFIG)), draw(2, 9, D, seed=50)
    yours = given(adapters.mamba_mixer(D, C, N, R, W), own)
    with torch.no_grad(), use_rung("naive"):
        wrong = {
            "the inner norms are missing: delta, B and C each pass through one": mamba_with(own, x, norms=False),
            "softplus of delta is missing": mamba_with(own, x, step=lambda delta: delta),
            "the bias of dt_proj is left out: without it a step is 0.7 long": mamba_with(own, x, bias=False),
            "the gate is z: multiply by silu(z)": mamba_with(own, x, gate=lambda z: z),
            "the gate silu(z) is left out": mamba_with(own, x, gate=torch.ones_like),
            "SiLU comes twice: causal_conv applies it already": mamba_with(own, x, inner=lambda x: F.silu(F.silu(x))),
            "SiLU after the convolution is missing": mamba_with(own, x, inner=lambda x: x),
            "x and z are swapped: the first half is x": mamba_with(own, x, swapped=True),
            "A is -exp(A_log), not A_log": mamba_with(own, x, negative=False),
        }
        y, _ = yours(x, None)
        assert_matches(y, own(x, Layout()), EXACT, "the mixer", wrong)


@points(4)
def test_any_split_equals_the_whole():
    own, x = filled(Mamba(CONFIG)), draw(2, 9, D, seed=50)
    yours = given(adapters.mamba_mixer(D, C, N, R, W), own)

    with torch.no_grad(), use_rung("naive"):
        whole = own(x, Layout())
        for lengths in [5, 4], [2, 1, 6], [1] * 9:
            found = in_pieces(yours, x, lengths)
            wrong = {
                "window and state of the earlier calls are forgotten": carried(own, x, lengths),
                "the window of the convolution is forgotten": carried(own, x, lengths, "state"),
                "the state of the scan is forgotten": carried(own, x, lengths, "window"),
            }
            assert_matches(found, whole, EXACT, f"y in pieces of {lengths}", wrong)
