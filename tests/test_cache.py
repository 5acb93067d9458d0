from dataclasses import replace

import pytest
import safetensors.torch
import torch

from minijamba.cache import Cache, KeyValues
from minijamba.generate import generate
from minijamba.model import Jamba
from minijamba.testing import assert_matches, assert_rejects

# float64: other orders of summation, over some hundred terms and four layers.
FLOAT64 = 1e-12


@pytest.fixture(scope="module")
def model(hybrid, long_memory):
    return long_memory(Jamba(hybrid)).double().requires_grad_(False)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def draw(*shape, seed=0):
    return torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(seed))


def contents(cache):
    """All that decides what the cache goes on with: tensors, slots in use only."""
    tensors = {"lengths": cache.lengths, "segment": cache.segment}
    if cache.documents is not None:
        tensors["documents"] = cache.documents[:, : cache.filled]
    for i, layer in enumerate(cache.layers):
        slots = slice(cache.filled) if isinstance(layer, KeyValues) else slice(None)
        tensors |= {f"{i}.{name}": tensor[:, slots].clone() for name, tensor in vars(layer).items()}
    return tensors


def used(model, kind="plain"):
    """A cache of two rows, after six tokens."""
    cache, tokens = model.new_cache(2, kv="int8" if kind == "eight bits" else None), draw(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool() if kind == "ragged" else None
    segments = torch.tensor([[1, 1, 1, 2, 2, 2], [5, 5, 6, 6, 7, 7]]) if kind == "packed" else None
    model(tokens, cache=cache, mask=mask, segments=segments)
    return cache


kinds = pytest.mark.parametrize("kind", ["plain", "ragged", "packed", "eight bits"])


def test_eight_bits_change_little_and_the_split_nothing(model):
    tokens = draw(2, 12)
    plain = model(tokens)

    def run(*lengths):
        cache = model.new_cache(2, kv="int8")
        return torch.cat([model(part, cache=cache) for part in tokens.split(lengths, dim=1)], dim=1)

    whole = run(12)
    assert 1e-5 < (whole - plain).abs().max() / plain.abs().max() < 2e-2

    def check(lengths):
        # A number in the middle between two of eight bits may go either way.
        assert_matches(run(*lengths), whole, 1e-6, "logits")

    for lengths in ([1] * 12, [5, 7], [11, 1]):
        check(lengths)
    assert_rejects(lambda kv: assert_matches(run(12), kv, 1e-6, "logits"), plain)
    with pytest.raises(ValueError, match="int8"):
        model.new_cache(2, kv="int4")
    with pytest.raises(ValueError, match="head_dim is 5"):
        Cache(replace(model.config, head_width=5), 1, kv="int8")


def test_eight_bits_take_half_the_room(hybrid):
    def nbytes(kv):
        layers = Cache(hybrid, 3, capacity=10, dtype=torch.bfloat16, kv=kv).layers
        return sum(tensor.nbytes for layer in layers if isinstance(layer, KeyValues) for tensor in vars(layer).values())

    heads = 2 * 3 * 10 * 2 * 2  # layers, rows, slots, groups, keys and values
    assert nbytes(None) == heads * 4 * 2
    assert nbytes("int8") == heads * (4 + 4)  # in heads of 4 numbers; in heads of 128 the scales are 3% more


@kinds
@pytest.mark.parametrize("take", [Cache.copy, lambda cache: cache.select([0, 1])], ids=["copy", "select"])
def test_a_copy_is_equal_and_independent(model, kind, take):
    def check(take):
        cache = used(model, kind)
        before = contents(cache)
        other = take(cache)
        assert_matches(contents(other), before, 0, "copy")
        model(draw(2, 3, seed=1), cache=other)
        model(draw(2, 1, seed=2), cache=other)
        assert_matches(contents(cache), before, 0, "original after the copy went on")
        assert (cache.filled, other.filled) == (6, 10)

    def shallow(cache):
        other = Cache(cache.config, 2, dtype=torch.float64)
        vars(other).update(vars(cache))
        return other

    check(take)
    assert_rejects(check, shallow, lambda cache: Cache(cache.config, 2, dtype=torch.float64))


def test_select_takes_rows_in_any_order_and_number(model):
    cache, answer = used(model, "ragged"), draw(3, 4, seed=1)
    expected = model(torch.cat([draw(2, 6)[0], answer[1]])[None])[0, -4:]

    def check(rows):
        chosen = cache.select(rows)
        assert chosen.lengths.tolist() == [4, 6, 4]
        assert_matches(model(answer, cache=chosen)[1], expected, FLOAT64, "row")

    check([1, 0, 1])
    check(torch.tensor([1, 0, 1]))
    assert_rejects(check, [0, 1, 0])
    short = cache.select([1])
    assert (short.filled, short.ragged) == (4, False), "the long row is gone, and with it its slots"
    assert_matches(
        model(answer[:1], cache=short), model(torch.cat([draw(2, 6)[1, 2:], answer[0]])[None])[:, -4:], FLOAT64, "short"
    )


@kinds
def test_a_saved_cache_is_equal_and_goes_on_equally(model, kind, tmp_path):
    cache = used(model, kind)
    cache.save(tmp_path / "cache.safetensors")
    other = Cache.load(tmp_path / "cache.safetensors")
    assert other.config == cache.config
    assert (other.filled, other.ragged, other.dtype) == (cache.filled, cache.ragged, torch.float64)
    assert_matches(contents(other), contents(cache), 0, "loaded")

    def check(other):
        more = draw(2, 5, seed=1)
        expected = model(more, cache=cache.copy())
        assert_matches(model(more, cache=other), expected, 0, "logits")

    check(other)
    assert_rejects(check, used(model, "packed" if kind == "plain" else "plain"))


def test_a_cache_saved_before_its_first_token(model, tmp_path):
    model.new_cache(2).save(tmp_path / "empty")
    tokens = draw(2, 5)
    assert_matches(model(tokens, cache=Cache.load(tmp_path / "empty")), model(tokens), FLOAT64, "logits")


def test_saving_leaves_out_room_not_yet_used(model, tmp_path):
    caches = {"small": model.new_cache(2), "roomy": model.new_cache(2, capacity=5000)}
    for name, cache in caches.items():
        model(draw(2, 6), cache=cache)
        cache.save(tmp_path / name)
    assert (tmp_path / "small").read_bytes() == (tmp_path / "roomy").read_bytes()


def test_a_cache_from_a_run_with_gradients_can_be_saved(model, tmp_path):
    with torch.enable_grad():
        trained = Jamba(model.config).double()
        cache = trained.new_cache(2)
        trained(draw(2, 6), cache=cache)
    cache.save(tmp_path / "cache")
    assert_matches(contents(Cache.load(tmp_path / "cache")), contents(cache), 0, "loaded")


def test_saving_that_fails_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    used(model).save(path)
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(ValueError, match=r"cache.safetensors: cannot be written \(No space left.*bytes free"):
        used(model, "packed").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_to_an_impossible_place_is_one_sentence(model, tmp_path):
    for path in (tmp_path / "absent" / "cache", tmp_path):
        with pytest.raises(ValueError, match="cannot be written"):
            used(model).save(path)
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_not_a_cache_is_one_sentence(model, tmp_path):
    used(model).save(tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    (tmp_path / "truncated").write_bytes(content[: len(content) // 2])
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "weights", metadata={"format": "pt"})
    for name, match in {"absent": "no such file", "truncated": "not a cache", "pickle": "not a cache"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{match}"):
            Cache.load(tmp_path / name)
    with pytest.raises(ValueError, match="weights: not a cache"):
        Cache.load(tmp_path / "weights")


def test_nbytes_is_its_formula(hybrid):
    """Two attention layers: 2 g p numbers a slot. Two Mamba layers: (w-1) c + c n. A length and a segment: 8 bytes."""

    def check(dtype, size, state_size):
        cache = Cache(hybrid, 3, capacity=50, dtype=dtype)
        g, p, w, c, n = 2, 4, 4, 32, 4
        row = 2 * 50 * 2 * g * p * size + 2 * ((w - 1) * c * size + c * n * state_size) + 2 * 8
        assert cache.nbytes == 3 * row

    check(torch.float32, 4, 4)
    check(torch.bfloat16, 2, 4)
    check(torch.float64, 8, 8)
    with pytest.raises(AssertionError):
        check(torch.bfloat16, 2, 2)


@kinds
def test_growth_keeps_what_is_there_and_is_rare(model, kind):
    cache, roomy = used(model, kind), used(model, kind)
    roomy_layers = [layer for layer in roomy.layers if isinstance(layer, KeyValues)]
    for layer in roomy_layers:
        for name, x in vars(layer).items():
            setattr(layer, name, torch.cat([x, x.new_zeros(2, 200, *x.shape[2:])], dim=1))
    sizes, tokens = set(), draw(2, 40, seed=1)
    for t in range(40):
        kept = contents(cache)["1.keys"]
        filled = cache.filled
        actual = model(tokens[:, t : t + 1], cache=cache)
        assert_matches(actual, model(tokens[:, t : t + 1], cache=roomy), FLOAT64, f"token {t}")
        if kind != "ragged":
            assert_matches(cache.layers[1].keys[:, :filled], kept, 0, "earlier keys")
        sizes.add(cache.layers[1].keys.shape[1])
    assert sizes == {12, 24, 48}, "doubling: each token is copied a few times, however long the sequence"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_stay_as_they_are(hybrid, long_memory, dtype):
    model = long_memory(Jamba(hybrid)).to(dtype)
    cache = model.new_cache(2)
    for steps in (5, 1, 3, 1):
        assert model(draw(2, steps), cache=cache).dtype == dtype
        for layer in cache.layers:
            for name, tensor in vars(layer).items():
                assert tensor.dtype == (torch.float32 if name == "state" else dtype), name


@kinds
@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_computes_in_half_and_remembers_in_full(hybrid, long_memory, kind, gradients):
    model, more = long_memory(Jamba(hybrid)), draw(2, 6, seed=1)
    if gradients and kind == "eight bits":
        cache = used(model, kind)
        with torch.enable_grad(), pytest.raises(ValueError, match="no gradient.*no_grad"):
            model(more, cache=cache)
        assert_matches(model(more, cache=cache), model(more, cache=used(model, kind)), 0, "after the refusal")
        return
    with torch.no_grad():
        expected = model(more, cache=used(model, kind))

    def check(more):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            cache = used(model, kind)
            logits = torch.cat([model(piece, cache=cache) for piece in more.split([3, 1, 1, 1], dim=1)], dim=1)
        assert logits.dtype == torch.bfloat16
        # Some dozen roundings of 2^-9 through four layers.
        assert_matches(logits, expected, 0.05, "autocast")
        dtypes = {tensor.dtype for layer in cache.layers for tensor in vars(layer).values()}
        assert dtypes == {torch.float32} | ({torch.int8} if kind == "eight bits" else set())

    check(more)
    assert_rejects(check, more.roll(1, dims=1))


def test_lengths_count_real_tokens(model):
    cache = used(model, "ragged")
    assert cache.lengths.tolist() == [6, 4]
    model(draw(2, 3), cache=cache)
    assert cache.lengths.tolist() == [9, 7]
    model(draw(2, 3), cache=cache, mask=torch.tensor([[0, 0, 0], [0, 1, 1]]).bool())
    assert cache.lengths.tolist() == [9, 9]
    assert not cache.ragged


def test_a_call_that_broke_off_makes_the_cache_refuse(model, tmp_path):
    """Half of the layers have taken the tokens: whatever went on from here would be silently wrong."""
    cache = used(model)
    kept = cache.copy()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(draw(2, 3), cache=cache)
    handle.remove()
    for use in (lambda: model(draw(2, 3), cache=cache), lambda: cache.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="a call that broke off"):
            use()
    with pytest.raises(ValueError, match="a call that broke off"):
        model(draw(2, 3), cache=cache.copy())
    model(draw(2, 3), cache=kept)


def test_a_cache_of_another_model_is_refused_untouched(model):
    tokens, other = draw(2, 3), replace(model.config, mamba_d_state=8)
    for match, cache in {
        "holds 1 sequences and tokens has 2 rows": model.new_cache(1),
        "another configuration": Cache(other, 2, dtype=torch.float64),
        "the cache is torch.float32, the model torch.float64": Cache(model.config, 2),
    }.items():
        with pytest.raises(ValueError, match=match):
            model(tokens, cache=cache)
        assert cache.filled == 0 and cache.whole


@torch.no_grad()
def test_documents_stay_apart_in_a_cache_that_was_fixed_before(hybrid, long_memory):
    model, tokens = long_memory(Jamba(hybrid)).double(), draw(1, 7)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def read(fixed, segments=segments):
        cache = model.new_cache(1, capacity=9)
        if fixed:
            cache.fix(9)
        model(tokens[:, :6], cache=cache, segments=segments)
        return model(tokens[:, 6:], cache=cache)

    def check(segments):
        assert_matches(read(True, segments), read(False), 1e-12, "the next token")

    check(segments)
    assert_rejects(check, torch.zeros_like(segments))


def test_room_is_made_once_and_for_what_is_asked(model):
    cache = model.new_cache(1)
    generate(model, draw(1, 5), max_new_tokens=3, stop=(), cache=cache)
    assert cache.capacity == 8
    generate(model, draw(1, 2), max_new_tokens=1, stop=(), cache=cache)
    assert cache.capacity == 11
    cache.reserve(4)
    assert cache.capacity == 11


def test_a_cache_ends_with_an_exception_in_the_stream(model):
    def stream(chosen):
        raise KeyboardInterrupt

    cache = model.new_cache(1)
    with pytest.raises(KeyboardInterrupt):
        generate(model, draw(1, 5), max_new_tokens=9, stop=(), cache=cache, stream=stream)
    with pytest.raises(ValueError, match="start anew"):
        generate(model, draw(1, 5), max_new_tokens=9, stop=(), cache=cache)
