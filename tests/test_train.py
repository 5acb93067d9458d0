"""A step is the gradient's, whole or in pieces, recomputed or not, packed or apart; a run ends when told, and breaks
at the first number that is not finite."""

import doctest
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from minijamba import Jamba, preset
from minijamba.data import IGNORED, Batch, Windows, pack
from minijamba.model import Trace
from minijamba.moe import expert_load
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import BOS
from minijamba.train import Trainer, Watch, evaluate, losses, parameter_groups, schedule, train

CONFIG = preset("tiny", num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Jamba(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    """A text in which each token follows from the one before it; none is special."""
    return np.arange(4000) * 7 % (CONFIG.vocab_size - 3) + 3


@pytest.fixture
def packed(hybrid):
    """Rows of several documents with special borders, of unequal numbers of judged targets."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, hybrid.vocab_size, (4, 25), generator=generator)
    for row, borders in enumerate(([0], [5, 6, 20], [], [1, 2, 3, 4, 9, 24])):
        windows[row, borders] = BOS
    return pack(windows)


def test_training_lowers_the_loss_on_text_not_trained_on(model, tokens):
    held_out = [Windows(tokens, 4, 32, seed=1)(step) for step in range(2)]
    before = evaluate(model, held_out)
    history = train(model, Windows(tokens, 4, 32), steps=30, learning_rate=0.01, progress=False)
    assert_matches(before, math.log(CONFIG.vocab_size), 0.02, "loss of a model that knows nothing")
    assert evaluate(model, held_out) < 0.5 * before
    assert [record.step for record in history] == list(range(30))
    assert all(record.tokens_per_second > 0 and len(record.activations) == 5 for record in history)


def test_one_batch_is_learnt_by_heart():
    """Tokens without any rule, rows that begin apart: only memory brings the loss below 0.01."""
    torch.manual_seed(0)
    model = Jamba(preset("tiny", router_aux_loss_coef=0.0))
    batch = pack(torch.stack([torch.randperm(model.config.vocab_size - 3)[:26] + 3 for _ in range(2)]))
    history = train(model, lambda step: batch, steps=150, learning_rate=0.01, weight_decay=0.0, progress=False)
    assert history[0].loss > 4.5 and evaluate(model, [batch]) < 0.01


def test_the_gradient_is_the_slope_of_the_loss(hybrid, packed, long_memory):
    """Of the whole model in float64, along a random direction of every parameter: central differences."""
    model = long_memory(Jamba(hybrid).double())
    names = [name for name, _ in model.named_parameters()]

    def total():
        loss, balance = losses(model, packed)
        return loss + 0.1 * balance

    total().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def check(change):
        generator, step = torch.Generator().manual_seed(1), 1e-6
        for name in names:
            parameter = model.get_parameter(name)
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += step * direction
            above = total()
            parameter -= 2 * step * direction
            below = total()
            parameter += step * direction
            slope = (change(gradients[name]) * direction).sum()
            # Differences of numbers of about 4 in float64: 1e-16 * 4 / 1e-6, and curvature of the same size.
            assert abs((above - below) / (2 * step) - slope) < 1e-7 * max(1.0, slope.abs()), name

    check(lambda gradient: gradient)
    assert_rejects(check, lambda gradient: 1.001 * gradient)


def after_one_step(config, batch, loss_is_mean_of_pieces=False, **options):
    """All parameters after a step at a constant rate, in float64."""
    torch.manual_seed(0)
    model = Jamba(config).double()
    trainer = Trainer(model, clip=1e9, **options)
    if loss_is_mean_of_pieces:
        trainer._backward = lambda piece, judged: Trainer._backward(
            trainer, piece, (piece.targets != IGNORED).sum() * trainer.accumulate
        )
    # With plain gradient steps a wrong scale shows, which Adam would divide away.
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    trainer.step(batch, 0.1)
    return dict(model.state_dict())


def test_pieces_of_a_batch_add_up_to_the_batch(hybrid, packed):
    """The cross-entropy; the balance of the experts is each piece's own, so it is off here."""
    config = replace(hybrid, router_aux_loss_coef=0.0)
    whole = after_one_step(config, packed)

    def check(options):
        # float64, sums in another order
        assert_matches(after_one_step(config, packed, **options), whole, 1e-12, "parameters")

    check({"accumulate": 2})
    check({"accumulate": 4})
    packed.targets[1] = IGNORED  # a piece in which nothing is judged
    whole = after_one_step(config, packed)
    check({"accumulate": 4})
    assert_rejects(check, {"accumulate": 4, "loss_is_mean_of_pieces": True})
    with pytest.raises(ValueError, match="4 sequences do not make 3 equal pieces"):
        after_one_step(config, packed, accumulate=3)


def test_recomputed_activations_give_the_same_gradient(hybrid, packed, monkeypatch):
    whole = after_one_step(hybrid, packed)
    calls = []
    forward = Jamba._block
    monkeypatch.setattr(
        Jamba, "_block", lambda self, *rest: calls.append(self.recompute) or forward(self, *rest)
    )
    assert_matches(after_one_step(hybrid, packed, recompute=True), whole, 0, "parameters")
    assert calls and all(calls)


def test_recomputing_keeps_less(hybrid):
    def kept(recompute):
        model = Jamba(hybrid)
        model.recompute = recompute
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(3, hybrid.vocab_size, (4, 64)))
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_packed_documents_cost_what_they_cost_apart(hybrid, packed, long_memory):
    model = long_memory(Jamba(hybrid).double())
    total, judged = 0.0, 0
    for tokens, targets, segments in zip(*packed, strict=True):
        for document in segments.unique():
            here = segments == document
            if count := int((targets[here] != IGNORED).sum()):
                apart = Batch(tokens[here][None], targets[here][None])
                total, judged = total + count * losses(model, apart)[0].item(), judged + count

    def check(batch):
        assert_matches(losses(model, batch)[0], total / judged, 1e-12, "loss")  # float64, a hundred terms

    check(packed)
    assert_rejects(check, packed._replace(segments=None))


def test_the_loss_is_that_of_the_next_token(model, tokens):
    """Judged by probabilities picked one by one."""
    batch = Windows(tokens, 2, 5)(0)

    def check(variant):
        loss, _ = losses(model, variant)
        picked = [
            model(batch.tokens)[row, t].log_softmax(-1)[batch.targets[row, t]] for row in range(2) for t in range(5)
        ]
        assert_matches(loss, -torch.stack(picked).mean(), 1e-5, "cross-entropy")  # float32, mean of ten

    check(batch)
    assert_rejects(check, batch._replace(targets=batch.tokens))


def test_the_balance_loss_counts_and_is_absent_without_experts(model, tokens):
    batch = Windows(tokens, 2, 16)(0)
    balance = losses(model, batch)[1].item()
    assert CONFIG.num_experts_per_tok - 1e-3 < balance < CONFIG.num_experts
    assert losses(Jamba(preset("tiny", num_experts=1)), batch)[1].item() == 0


def test_the_balance_loss_reaches_the_router(tokens):
    def grown(coefficient):
        torch.manual_seed(0)
        model = Jamba(preset("tiny", num_hidden_layers=2, router_aux_loss_coef=coefficient))
        train(model, Windows(tokens, 2, 16), steps=3, progress=False)
        return model.model.layers[1].feed_forward.router.weight.detach()

    assert not torch.equal(grown(0.0), grown(1.0))


def test_expert_load_counts_choices(model, tokens):
    trace = Trace()
    losses(model, Windows(tokens, 2, 16)(0), trace)
    load = expert_load(trace.experts, 4)
    assert load.shape == (2, 4)
    for layer, row in zip(trace.router, load, strict=True):
        chosen = [i for logits in layer.flatten(0, 1) for i in logits.topk(2).indices.tolist()]
        assert_matches(row, [chosen.count(i) / len(chosen) * 4 for i in range(4)], 1e-6, "load")  # float32 means


def test_only_matrices_decay(model):
    def check(groups):
        decayed, kept = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert decayed | kept == set(names.values()) and not decayed & kept
        spared = ("A_log", ".D", "bias", "norm.weight", "embed_tokens.weight")
        assert all(name.endswith(spared) == (name in kept) for name in names.values())

    def everything_decays():
        decaying, _ = parameter_groups(model, 0.1)
        return [{**decaying, "params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}]

    biased = replace(model.config, mlp_bias=True, router_bias=True, head_bias=True)
    for either in (Jamba(biased), model):
        names = {id(parameter): name for name, parameter in either.named_parameters()}
        check(parameter_groups(either, 0.1))
    assert_rejects(check, everything_decays())


def test_new_biases_are_zero_but_for_those_with_a_start_of_their_own(model):
    biased = replace(model.config, mlp_bias=True, router_bias=True, head_bias=True, mamba_proj_bias=True)
    for name, parameter in Jamba(biased).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all() != name.endswith(("dt_proj.bias", "conv1d.bias")), name


def test_a_tied_head_is_an_embedding():
    model = Jamba(preset("tiny", tie_word_embeddings=True))
    decayed, kept = parameter_groups(model, 0.1)
    assert any(parameter is model.lm_head.weight for parameter in kept["params"])
    assert sum(parameter.numel() for group in (decayed, kept) for parameter in group["params"]) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_schedule_rises_and_falls():
    shares = [schedule(i / 100) for i in range(101)]
    assert shares[0] == 0 and max(shares) == 1 == shares[5] and math.isclose(shares[-1], 0.1)
    assert shares[:6] == sorted(shares[:6]) and shares[5:] == sorted(shares[5:], reverse=True)


def test_a_run_ends_with_steps_or_seconds(model, tokens):
    batches = Windows(tokens, 1, 8)
    assert len(train(model, batches, steps=2, seconds=1000, progress=False)) == 2
    assert 0 < len(train(model, batches, seconds=0.5, progress=False)) < 1000
    with pytest.raises(ValueError, match="give steps or seconds"):
        train(model, batches)
    with pytest.raises(ValueError, match="steps is 0"):
        train(model, batches, steps=0, seconds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_leaves_the_recurrence_in_float32(tokens, dtype):
    """Whether the weights are bfloat16 or only the arithmetic is, A_log and delta's bias move in float32."""
    torch.manual_seed(0)
    model = Jamba(CONFIG).to(dtype)
    history = train(model, Windows(tokens, 2, 16), steps=4, bfloat16=dtype == torch.float32, progress=False)
    assert all(math.isfinite(record.loss) for record in history)
    mixer = model.model.layers[0].mamba
    assert mixer.A_log.dtype == mixer.dt_proj.bias.dtype == torch.float32 and mixer.in_proj.weight.dtype == dtype


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_model(model, tokens):
    before, windows = {}, Windows(tokens, 1, 8)

    def batches(step):
        if step == 2:
            model.model.layers[1].mamba.D.data[0] = torch.nan
            before.update((name, value.clone()) for name, value in model.state_dict().items())
        return windows(step)

    with pytest.raises(FloatingPointError, match=r"step 2: loss nan.*layer 1 \(mamba, experts\) .*Lower the learning"):
        train(model, batches, steps=10, progress=False)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())


def test_the_layer_that_grew_first_is_named(model, tokens):
    """Layer 2 swells for some steps, then layer 0 breaks: the first to grow is named."""
    history = train(model, Windows(tokens, 1, 8), steps=20, progress=False)
    sizes = [list(record.activations) for record in history]
    for step, factor in ((17, 5.0), (18, 50.0)):
        sizes[step][3] *= factor
    sizes[19] = [math.inf] * 5

    def check(order):
        watch = Watch(model)
        for i in order:
            watch.see(history[i]._replace(activations=tuple(sizes[i])))
        assert watch.verdict().startswith("layer 2 (attention, MLP) grew first, at step 17")

    check(range(20))
    assert_rejects(check, range(17), [*range(17), 19])


def test_the_docstrings_examples_hold():
    results = doctest.testmod(sys.modules["minijamba.train"])
    assert results.attempted and not results.failed
