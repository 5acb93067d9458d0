"""A run lowers the loss, decays what should decay, ends when told, and stops at the first number that is not finite."""

import doctest
import math
import sys
from itertools import islice, repeat

import pytest
import torch

from minijamba import Jamba, preset
from minijamba.data import random_windows
from minijamba.testing import assert_matches, assert_rejects
from minijamba.train import evaluate, losses, parameter_groups, schedule, train

CONFIG = preset("tiny", num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Jamba(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    """A text in which each token follows from the one before it."""
    return torch.arange(4000) * 7 % CONFIG.vocab_size


def test_training_lowers_the_loss_on_text_not_trained_on(model, tokens):
    held_out = list(islice(random_windows(tokens, 4, 32, seed=1), 2))
    before = evaluate(model, held_out)
    history = train(model, random_windows(tokens, 4, 32), steps=30, learning_rate=0.01, progress=False)
    assert_matches(before, math.log(CONFIG.vocab_size), 0.02, "loss of a model that knows nothing")
    assert evaluate(model, held_out) < 0.5 * before
    assert [record.step for record in history] == list(range(30))
    assert all(record.tokens_per_second > 0 for record in history)


def test_the_same_seeds_give_the_same_run(tokens):
    def run():
        torch.manual_seed(0)
        return [record.loss for record in train(Jamba(CONFIG), random_windows(tokens, 2, 16), steps=4, progress=False)]

    assert run() == run()


def test_the_loss_is_that_of_the_next_token(model, tokens):
    """Judged by probabilities picked one by one."""
    batch = next(random_windows(tokens, 2, 5))

    def check(variant):
        loss, _ = losses(model, variant)
        picked = [
            model(batch[:, :-1])[row, t].log_softmax(-1)[batch[row, t + 1]] for row in range(2) for t in range(5)
        ]
        assert_matches(loss, -torch.stack(picked).mean(), 1e-5, "cross-entropy")  # float32, mean of ten

    check(batch)
    assert_rejects(check, batch.flip(1))


def test_the_balance_loss_counts_and_is_absent_without_experts(model, tokens):
    batch = next(random_windows(tokens, 2, 16))
    balance = losses(model, batch)[1].item()
    assert CONFIG.num_experts_per_tok - 1e-3 < balance < CONFIG.num_experts
    assert losses(Jamba(preset("tiny", num_experts=1)), batch)[1].item() == 0


def test_the_balance_loss_reaches_the_router(tokens):
    def grown(coefficient):
        torch.manual_seed(0)
        model = Jamba(preset("tiny", num_hidden_layers=2, router_aux_loss_coef=coefficient))
        train(model, random_windows(tokens, 2, 16), steps=3, progress=False)
        return model.model.layers[1].feed_forward.router.weight.detach()

    assert not torch.equal(grown(0.0), grown(1.0))


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

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    check(parameter_groups(model, 0.1))
    assert_rejects(check, everything_decays())


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


def test_a_run_ends_with_steps_seconds_or_batches(model, tokens):
    batches = random_windows(tokens, 1, 8)
    assert len(train(model, batches, steps=2, seconds=1000, progress=False)) == 2
    assert len(train(model, islice(batches, 3), steps=10, progress=False)) == 3
    assert 0 < len(train(model, batches, seconds=0.5, progress=False)) < 1000
    with pytest.raises(ValueError, match="give steps or seconds"):
        train(model, batches)
    with pytest.raises(ValueError, match="steps is 0"):
        train(model, batches, steps=0, seconds=1)


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_model(model, tokens):
    batch = next(random_windows(tokens, 1, 8))

    def batches():
        yield from repeat(batch, 2)
        model.model.final_layernorm.weight.data[0] = torch.nan
        before.update((name, value.clone()) for name, value in model.state_dict().items())
        yield batch

    before = {}
    with pytest.raises(FloatingPointError, match="step 2: loss nan.*lower the learning rate"):
        train(model, batches(), steps=10, progress=False)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())


def test_the_docstrings_examples_hold():
    results = doctest.testmod(sys.modules["minijamba.train"])
    assert results.attempted and not results.failed
