"""Generation against its definition: the whole prompt again for each token."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import minijamba as mj
from minijamba.cache import MambaState
from minijamba.generate import Writer, _penalise, generate, sample
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def model(hybrid, long_memory):
    model = long_memory(mj.Jamba(hybrid).double()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "b_layernorm" in name or "c_layernorm" in name:
                weight.mul_(4)  # the state speaks so loudly that losing it changes the likeliest token
    return model


def prompt(*lengths, seed=0):
    """Prompts of the given lengths as lists of ints, without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 41, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def whole_again(model, tokens, steps):
    """Greedy decoding by its definition: one row, no cache."""
    row = torch.tensor([tokens])
    for _ in range(steps):
        row = torch.cat([row, model(row)[:, -1].argmax(-1)[:, None]], dim=1)
    return row[:, len(tokens) :]


def check_greedy(continue_prompt, model):
    for tokens in prompt(1, 2, 9, 17):
        expected = whole_again(model, tokens, 12)
        assert torch.equal(continue_prompt(model, tokens), expected), f"a prompt of {len(tokens)} tokens"


def test_greedy_equals_the_whole_prompt_again(model):
    check_greedy(lambda model, tokens: generate(model, tokens, max_new_tokens=12, stop=()), model)


def test_the_check_rejects_lost_state_and_wrong_position(model):
    def cached(model, tokens, first=-1, forget=False):
        cache, row = model.new_cache(), torch.tensor([tokens])
        new = []
        with torch.no_grad():
            logits = model(row, cache=cache)[:, first]
            for _ in range(12):
                new.append(logits.argmax(-1))
                for layer in cache.layers:
                    if forget and isinstance(layer, MambaState):
                        layer.state.zero_()
                logits = model(new[-1][:, None], cache=cache)[:, -1]
        return torch.stack(new, dim=1)

    def lost_state(model, tokens):
        return cached(model, tokens, forget=True)

    def first_position(model, tokens):
        return cached(model, tokens, first=0)

    check_greedy(cached, model)
    assert_rejects(lambda variant: check_greedy(variant, model), lost_state, first_position)


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 100])
def test_chunks_of_the_prompt_change_nothing(model, chunk):
    tokens = prompt(17, 5)
    whole = generate(model, tokens, max_new_tokens=8, stop=())
    assert torch.equal(generate(model, tokens, max_new_tokens=8, stop=(), chunk=chunk), whole)


@pytest.mark.parametrize("where", ["left", "right", "spread"])
def test_a_row_of_a_batch_is_what_it_is_alone(model, where):
    rows = prompt(3, 11, 7)
    alone = torch.cat([generate(model, row, max_new_tokens=8, stop=()) for row in rows])
    tokens, mask = torch.full((3, 11), 2), torch.zeros(3, 11, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = {"left": range(11 - len(row), 11), "right": range(len(row)), "spread": range(0, 11, 11 // len(row))}[where]
        places = list(at)[: len(row)]
        tokens[i, places], mask[i, places] = torch.tensor(row), True
    assert torch.equal(generate(model, tokens, mask=mask, max_new_tokens=8, stop=(), chunk=4), alone)
    assert torch.equal(generate(model, rows, max_new_tokens=8, stop=()), alone)
    unmasked = generate(model, tokens, max_new_tokens=8, stop=())
    assert not torch.equal(unmasked, alone), "padding that is taken for text must show"


def test_stop_tokens_end_a_row_and_padding_fills_it(model):
    rows = prompt(6, 6, seed=3)
    free = generate(model, rows, max_new_tokens=10, stop=())
    end = int(free[0, 3])
    for stop in (end, [end, 40]):
        stopped = generate(model, rows, max_new_tokens=10, stop=stop)
        for row, plain in zip(stopped.tolist(), free.tolist(), strict=True):
            ends = [i for i, token in enumerate(plain) if token in ([stop] if isinstance(stop, int) else stop)]
            kept = ends[0] + 1 if ends else len(row)
            assert row[:kept] == plain[:kept] and set(row[kept:]) <= {0}
    assert len(generate(model, rows[0], max_new_tokens=10, stop=end)[0]) == free[0].tolist().index(end) + 1


def test_the_config_s_own_stop_tokens_are_the_default(hybrid, long_memory):
    first = int(generate(long_memory(mj.Jamba(hybrid).double()), [5, 6, 7], max_new_tokens=1, stop=()))
    config = mj.JambaConfig.from_dict({**hybrid.to_dict(), "eos_token_id": [first, 9]})
    assert generate(long_memory(mj.Jamba(config).double()), [5, 6, 7], max_new_tokens=5).tolist() == [[first]]


def test_stream_gets_every_step(model):
    steps = []
    new = generate(model, prompt(4, 9), max_new_tokens=6, stop=(), stream=steps.append)
    assert torch.equal(torch.tensor(steps).T, new)


def test_a_second_turn_on_a_reused_cache(model):
    first, second = prompt(7, 5)
    cache = model.new_cache()
    answer = generate(model, first, max_new_tokens=6, stop=(), cache=cache)[0].tolist()
    assert cache.lengths.tolist() == [7 + 6]
    follow = generate(model, second, max_new_tokens=6, stop=(), cache=cache)
    assert torch.equal(follow, generate(model, first + answer + second, max_new_tokens=6, stop=()))


def test_a_second_turn_after_rows_that_stopped_at_different_times(model):
    rows, second = prompt(6, 9, seed=3), prompt(4, 2, seed=5)
    end = int(generate(model, rows, max_new_tokens=10, stop=())[0, 3])
    cache = model.new_cache(2)
    answers = generate(model, rows, max_new_tokens=10, stop=end, cache=cache)
    answers = [row[: row.index(end) + 1] if end in row else row for row in answers.tolist()]
    assert cache.lengths.tolist() == [len(row) + len(answer) for row, answer in zip(rows, answers, strict=True)]
    follow = generate(model, second, max_new_tokens=5, stop=(), cache=cache)
    whole = [row + answer + more for row, answer, more in zip(rows, answers, second, strict=True)]
    assert torch.equal(follow, torch.cat([generate(model, row, max_new_tokens=5, stop=()) for row in whole]))


@torch.no_grad()
@pytest.mark.parametrize("rung", ["naive", "fused"])
def test_a_fixed_cache_gives_the_same_logits(hybrid, long_memory, rung):
    """Rows of different lengths, one of which ends on the way: it stays as it was, and its neighbours do not notice."""
    model = long_memory(mj.Jamba(hybrid)).to(DEVICE).eval()
    tokens = torch.tensor(prompt(20, 20), device=DEVICE)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 9:] = False
    next_tokens = torch.tensor(prompt(6, 6, seed=1), device=DEVICE).T
    real = torch.tensor([[True, True], [True, True], [True, False], [False, True], [True, True], [True, False]])

    def run(fix, real):
        cache, logits = model.new_cache(2), []
        with use_rung(rung):
            model(tokens, cache=cache, mask=mask)
            if fix:
                cache.fix(40)
                places = [vars(layer)[name].data_ptr() for layer in cache.layers for name in vars(layer)]
            for step, writing in zip(next_tokens, real.to(DEVICE), strict=True):
                logits.append(model(step[:, None], cache=cache, mask=writing[:, None])[:, 0])
        if fix:
            assert places == [vars(layer)[name].data_ptr() for layer in cache.layers for name in vars(layer)]
            cache.measure()
        logits.append(model(torch.tensor([[7], [8]], device=DEVICE), cache=cache)[:, 0])
        return {"logits": torch.stack(logits), "lengths": cache.lengths}

    fixed = run(True, real)

    def check(other):
        assert_matches(fixed, run(False, other), 1e-5, "fixed")

    check(real)
    assert_rejects(check, real | torch.tensor([False, True]), real.flip(0))


@torch.no_grad()
def test_a_fixed_cache_attends_to_its_window_and_turns_by_position(long_memory):
    """Mistral's layers: rotary positions, and a window of the last tokens."""
    config = mj.JambaConfig(
        vocab_size=41, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=1, attn_layer_period=1, attn_layer_offset=0, rope_theta=100.0,
        sliding_window=5, model_type="minijamba",
    )  # fmt: skip
    tokens = torch.tensor(prompt(12, 12), device=DEVICE)

    def run(config, rung):
        model = long_memory(mj.Jamba(config)).to(DEVICE).eval()
        cache = model.new_cache(2)
        with use_rung(rung):
            model(tokens[:, :4], cache=cache)
            cache.fix(12)
            return torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(4, 12)], 1)

    expected = long_memory(mj.Jamba(config)).to(DEVICE).eval()(tokens)[:, 4:]

    def check(config):
        for rung in ("naive", "fused"):
            assert_matches(run(config, rung), expected, 1e-5, rung)

    check(config)
    assert_rejects(check, replace(config, sliding_window=6), replace(config, rope_theta=101.0))


def test_a_cache_keeps_its_own_kind_of_keys(model):
    with pytest.raises(ValueError, match="leave kv out"):
        generate(model, [3, 4], cache=model.new_cache(1), kv="int8")
    generate(model, [3, 4], cache=model.new_cache(1, kv="int8"), kv="int8", max_new_tokens=1)


def test_a_fixed_cache_makes_room_and_refuses_documents(model):
    cache = model.new_cache(1)
    cache.fix(2)
    with torch.no_grad():
        expected = model(torch.tensor(prompt(9)))
        actual = torch.cat([model(torch.tensor([[token]]), cache=cache) for token in prompt(9)[0]], 1)
    assert_matches(actual, expected, 1e-12, "logits")
    packed = model.new_cache(1)
    model(torch.tensor([[5, 6]]), cache=packed, segments=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="packed documents"):
        packed.fix(9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3, "top_k": 5}])
def test_a_recorded_step_writes_what_the_loop_writes(hybrid, long_memory, monkeypatch, dtype, options):
    """Two turns on one cache, in which the rows end at different times. Without a GPU, both are the loop."""
    model = long_memory(mj.Jamba(hybrid)).to(DEVICE, dtype).eval()
    free = generate(model, prompt(4, 9, 1), max_new_tokens=60, stop=(), **options)
    stops = (int(free[0, 20]), int(free[1, 35]))

    def write(stop=stops, graph=True):
        cache = model.new_cache(3)
        cache.fix(200)
        settings = {"max_new_tokens": 60, "stop": stop, "cache": cache, "graph": graph, **options}
        return generate(model, prompt(4, 9, 1), **settings), generate(model, prompt(2, 2, 2), **settings), cache.lengths

    expected = write(graph=False)
    assert len({int(length) for length in expected[2]}) == 3, "rows end at different times"

    def check(turns):
        for one, other in zip(turns, expected, strict=True):
            assert torch.equal(one, other)

    recorded, record = [], Writer.record
    monkeypatch.setattr(Writer, "record", lambda *arguments: recorded.append(1) or record(*arguments))
    check(write())
    assert len(recorded) == 2 * (DEVICE.type == "cuda")
    assert_rejects(check, write(()))


@pytest.fixture
def asked(model, monkeypatch):
    """Bytes that `generate` asks for when it continues a cache by 200 tokens of a prompt and 2 new ones."""
    module, needs = import_module("minijamba.generate"), []
    monkeypatch.setattr(module, "refuse_if_too_large", lambda need, *_: needs.append(need))

    def ask(model, cache):
        generate(model, [3] * 200, max_new_tokens=2, stop=(), cache=cache)
        return needs[-1]

    return ask


@pytest.mark.parametrize("kv", [None, "int8"])
def test_memory_is_asked_for_what_comes_on_top_of_a_cache(model, asked, kv):
    plan = mj.budget(model.config, context=202, dtype=model.dtype, kv=kv)

    def check(capacity, expected):
        cache = model.new_cache(1, capacity=capacity, kv=kv)
        assert asked(model, cache) == expected

    for capacity in (202, 100_000):
        check(capacity, plan.activation_bytes)
        assert_rejects(lambda need, capacity=capacity: check(capacity, need), 0, plan.working_bytes)


def test_memory_is_asked_for_masks_and_for_the_rung_in_force(model, asked, monkeypatch):
    """Caches with documents or rows of different lengths need masks; `use_rung` switches kernels off."""
    module, plans = import_module("minijamba.generate"), []
    monkeypatch.setattr(module, "budget", lambda *_, **plan: plans.append(plan) or mj.budget(*_, **plan))
    monkeypatch.setattr(import_module("minijamba.rungs"), "why_no_kernels", lambda device: None)

    def check(ragged, kernels, rung="auto", **packed):
        cache = model.new_cache(2)
        with use_rung("parallel"):
            model(torch.tensor([[3, 4, 5, 6]] * 2), cache=cache, **packed)
        with use_rung(rung):
            module._refuse_beyond_memory(model, 206, 2, 100, None, cache, ragged=False)
        assert (plans[-1]["ragged"], plans[-1]["kernels"]) == (ragged, kernels)

    documents, padding = torch.tensor([[0, 0, 1, 1]] * 2), torch.ones(2, 4, dtype=torch.bool)
    padding[0, 0] = False
    check(False, True)
    check(False, False, "parallel")
    check(True, True, segments=documents)
    check(True, True, mask=padding)
    assert_rejects(lambda ragged: check(ragged, True, segments=documents), False)
    assert_rejects(lambda kernels: check(False, kernels, "naive"), True)


def test_a_cache_that_is_refused_stays_as_it_was(model):
    for cache in (model.new_cache(2), mj.Jamba(replace(model.config, num_hidden_layers=2)).double().new_cache(1)):
        with pytest.raises(ValueError, match="sequences|another configuration"):
            generate(model, [3] * 200, cache=cache)
        assert cache.nbytes == mj.Jamba(cache.config).double().new_cache(len(cache.lengths)).nbytes


def test_no_new_tokens(model):
    cache = model.new_cache()
    assert generate(model, [5, 6], max_new_tokens=0, cache=cache).shape == (1, 0)
    assert cache.lengths.tolist() == [2]


def test_the_same_seed_draws_the_same_tokens(model):
    def draw(seed):
        return generate(model, prompt(5), max_new_tokens=20, temperature=1.5, stop=(), seed=seed)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def shares(logits, **options):
    """How often each token is drawn in 20,000 tries."""
    drawn = sample(logits.expand(20_000, -1), generator=torch.Generator().manual_seed(0), **options)
    return drawn.bincount(minlength=logits.shape[-1]).double() / 20_000


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    cases = [
        ({"temperature": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, torch.tensor([0.15, 0.5, 0.05, 0.3]).square() / 0.365),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"temperature": 1.0, "top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 0.625, 0, 0.375]),
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        # top-p counts what top-k left: of 0.625 and 0.375 the first alone reaches 0.6.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ]
    for options, expected in cases:
        # 20,000 draws: a share deviates by 0.0035 (one standard deviation) at most.
        assert (shares(logits, **options) - torch.as_tensor(expected)).abs().max() < 0.015, options
    assert sample(logits[None]).item() == 1
    assert sample(logits[None], temperature=1e-42).item() == 1, "however low, a temperature draws the likeliest"


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, 3, 5], [0, 1, 10]])
    seen = torch.zeros(2, 11, dtype=torch.bool).scatter(1, tokens, True)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits.clone())
    assert torch.equal(_penalise(logits, seen, 1.3), theirs)
    assert not torch.equal(torch.where(seen, logits / 1.3, logits), theirs), "negative logits must fall, too"


def test_a_strong_penalty_forbids_repetition(model):
    new = generate(model, prompt(5), max_new_tokens=12, stop=(), repetition_penalty=1e9)[0].tolist()
    assert len(set(new)) == 12 and not set(new) & set(prompt(5)[0])
    assert len(set(generate(model, prompt(5), max_new_tokens=30, stop=())[0].tolist())) < 30


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([], {}, "empty"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "empty"),
        ([[3, 4], []], {}, "empty"),
        ([3, 41], {}, "41 is outside the vocabulary 0 .. 40"),
        ([-1], {}, "-1 is outside"),
        (torch.tensor([3]), {}, r"\(b, t\)"),
        ([3], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([3], {"temperature": -0.1}, "temperature is -0.1"),
        ([3], {"top_k": 0}, "top_k is 0"),
        ([3], {"top_p": 0.0}, "top_p is 0.0"),
        ([3], {"top_p": 1.1}, "top_p is 1.1"),
        ([3], {"repetition_penalty": 0}, "repetition_penalty is 0"),
        ([3], {"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ([3], {"temperature": float("nan")}, "temperature is nan"),
        ([3], {"chunk": 0}, "chunk is 0"),
        ([3], {"mask": torch.ones(1, 1)}, "padded for you"),
        (torch.tensor([[3]]), {"mask": torch.ones(1, 2)}, "shape of tokens"),
        ([3], {"max_new_tokens": 10**12}, "GiB free: use a smaller chunk, kv=\"int8\", a shorter context"),
        ([3], {"kv": "int4"}, "kv is 'int4'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(model, tokens, options, words):
    with pytest.raises(ValueError, match=words) as error:
        generate(model, tokens, **options)
    assert "\n" not in str(error.value)
