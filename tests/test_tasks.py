"""The synthetic tasks: what a row holds, what is judged, and that the tokens seen so far give every answer."""

import doctest
import re
import sys
from collections.abc import Callable
from itertools import islice

import pytest
import torch

from minijamba.data import IGNORED, Batch
from minijamba.tasks import (
    TASKS,
    _draw,
    _nearest_line_end,
    accuracy,
    associative_recall,
    batches,
    induction_heads,
    needle_in_text,
    repeated,
    selective_copying,
    solved,
    task_batch,
)
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BOS, EOS, BPETokenizer, ByteTokenizer

SETTINGS = {
    "selective_copying": {"length": 24, "vocabulary": 9, "memorise": 5},
    "induction_heads": {"length": 20, "vocabulary": 8},
    "associative_recall": {"length": 27, "vocabulary": 32, "pairs": 5},
    "needle": {"length": 23, "vocabulary": 9, "digits": 3},
    "repeated": {"length": 16, "vocabulary": range(7, 20)},
}
# How many different answers there are, all equally likely.
ANSWERS = {"selective_copying": 7, "induction_heads": 7, "associative_recall": 16, "needle": 8, "repeated": 13}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, batch=40, **changes):
    settings = SETTINGS[name] | changes
    return TASKS[name](batch, settings.pop("length"), generator=seeded(), **settings)


def rows(batch):
    """(tokens, targets) of every row, as lists."""
    return zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)


def judged(targets):
    return [i for i, target in enumerate(targets) if target != IGNORED]


# Solvers in plain Python: the answer after the last of the tokens seen so far, in a row of `length`.


def solve_selective_copying(seen, length):
    marker = seen[-1]
    data = [token for token in seen if token not in (0, marker)]
    return data[seen.count(marker) - 1]


def solve_needle(seen, length):
    marker = max(seen)
    said = seen[::-1].index(marker)
    return seen[seen.index(marker) + 1 + said]


def solve_associative_recall(seen, length):
    return seen[seen.index(seen[-1]) + 1]


def solve_repeated(seen, length):
    return seen[len(seen) - length // 2]


SOLVERS = {
    "selective_copying": solve_selective_copying,
    "induction_heads": solve_needle,
    "associative_recall": solve_associative_recall,
    "needle": solve_needle,
    "repeated": solve_repeated,
}


def assert_solvable(batch, name):
    for tokens, targets in rows(batch):
        for i in judged(targets):
            assert SOLVERS[name](tokens[: i + 1], len(tokens)) == targets[i], f"position {i} of {tokens}"


# Wrong variants of a batch.


def shifted(batch):
    """Every target one position late."""
    return Batch(batch.tokens, batch.targets.roll(1, 1))


def swapped(batch):
    """Within a row, every answer where the next one belongs."""
    targets = batch.targets.clone()
    for row in targets:
        row[row != IGNORED] = row[row != IGNORED].roll(1)
    return Batch(batch.tokens, targets)


def foreign(batch):
    """Every row with the answers of another row."""
    return Batch(batch.tokens, batch.targets.roll(1, 0))


def edited(batch, place, value):
    """One token of every row replaced."""
    tokens = batch.tokens.clone()
    tokens[:, place] = value
    return Batch(tokens, batch.targets)


@pytest.mark.parametrize("name", TASKS)
def test_what_was_seen_gives_every_answer(name):
    """So the task can be solved, and by no more than the past: a solver gets all rows right, a constant does not."""
    batch = make(name, 2000)
    assert_solvable(batch, name)
    assert_rejects(lambda wrong: assert_solvable(wrong, name), foreign(batch))

    vocabulary = int(batch.tokens.max()) + 1
    logits = torch.zeros(*batch.tokens.shape, vocabulary)
    for row, (tokens, targets) in enumerate(rows(batch)):
        for i in judged(targets):
            logits[row, i, SOLVERS[name](tokens[: i + 1], len(tokens))] = 1
    assert accuracy(logits, batch.targets) == solved(logits, batch.targets) == 1

    answers = batch.targets[batch.targets != IGNORED]
    guess = torch.zeros(vocabulary)
    guess[answers[0]] = 1
    chance, deviation = 1 / ANSWERS[name], (1 / ANSWERS[name] / len(answers)) ** 0.5
    assert abs(accuracy(guess.expand_as(logits), batch.targets) - chance) < 5 * deviation


@pytest.mark.parametrize("name", TASKS)
def test_kind_and_repeatability(name):
    batch = make(name)
    assert batch.tokens.shape == batch.targets.shape == (40, SETTINGS[name]["length"])
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.segments is None
    assert torch.equal(batch.tokens, make(name).tokens) and torch.equal(batch.targets, make(name).targets)
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 40, "rows differ"


@pytest.mark.parametrize("name", TASKS)
def test_every_token_of_the_vocabulary_comes(name):
    vocabulary = SETTINGS[name]["vocabulary"]
    expected = set(vocabulary if isinstance(vocabulary, range) else range(vocabulary))

    def check(tokens):
        assert set(tokens.unique().tolist()) == expected

    tokens = make(name, 400).tokens
    check(tokens)
    assert_rejects(check, tokens + 1, tokens.clamp(max=max(expected) - 1))


def test_selective_copying_rows():
    def check(batch):
        for tokens, targets in rows(batch):
            assert tokens[-5:] == [8] * 5 and 8 not in tokens[:-5]
            assert [token for token in tokens[:-5] if token != 0] == targets[-5:]
            assert judged(targets) == list(range(19, 24))

    batch = make("selective_copying")
    check(batch)
    assert_rejects(check, shifted(batch), swapped(batch), edited(batch, 20, batch.targets[:, 20]), edited(batch, 0, 1))


def test_data_may_stand_anywhere_and_be_anything():
    def check(batch):
        context = batch.tokens[:, :19]
        assert bool((context != 0).any(0).all()) and set(context.unique().tolist()) == set(range(8))

    check(make("selective_copying", 1000))
    assert_rejects(check, make("selective_copying", 1000, length=23), make("selective_copying", 1000, vocabulary=8))


def test_the_defaults_are_the_papers():
    copying = selective_copying(1, generator=seeded())
    assert copying.tokens.shape == (1, 4096) and len(judged(copying.targets[0])) == 16 and copying.tokens.max() == 15
    assert induction_heads(1, generator=seeded()).tokens.shape == (1, 256)


def check_needle(batch, digits, marker):
    for tokens, targets in rows(batch):
        question = len(tokens) - digits
        assert tokens.count(marker) == 2 and tokens[question] == marker
        found = tokens.index(marker)
        assert found + digits < question and targets[question:] == tokens[found + 1 : found + 1 + digits]
        assert judged(targets) == list(range(question, len(tokens)))
        assert tokens[question + 1 :] == targets[question:-1], "the answer so far"


def test_needle_rows():
    def check(batch):
        check_needle(batch, digits=3, marker=8)

    batch = make("needle")
    check(batch)
    assert_rejects(check, shifted(batch), swapped(batch), edited(batch, 5, 8), edited(batch, 20, 0))


def test_induction_heads_rows():
    def check(batch):
        check_needle(batch, digits=1, marker=7)

    batch = make("induction_heads")
    check(batch)
    before_last = Batch(batch.tokens, batch.targets.clone())
    before_last.targets[:, -1] = batch.tokens[:, -2]
    assert_rejects(check, shifted(batch), before_last, edited(batch, 4, 7))


@pytest.mark.parametrize("length", [3, 64, 2**20])
def test_induction_heads_of_any_length(length):
    check_needle(induction_heads(2, length, generator=seeded()), digits=1, marker=15)


@pytest.mark.parametrize("depth, place", [(0, 0), (0.25, 4), (0.5, 8), (1, 16)])
def test_the_depth_is_where_the_needle_is(depth, place):
    """17 places, 0 to 16: 23 tokens less a question of 3 and a needle of 3 behind its marker."""

    def check(batch):
        assert all(tokens.index(8) == place for tokens, _ in rows(batch))

    check(make("needle", depth=depth))
    assert_rejects(check, make("needle"), make("needle", depth=abs(depth - 0.06)))


def test_without_a_depth_every_place_comes():
    def check(batch):
        assert {tokens.index(8) for tokens, _ in rows(batch)} == set(range(17))

    check(make("needle", 1000))
    assert_rejects(check, make("needle", 1000, depth=0.5), make("needle", 1000, length=22))


@pytest.mark.parametrize("queries", ["all", 1, 3])
def test_associative_recall_rows(queries):
    def check(batch):
        for tokens, targets in rows(batch):
            keys, values, rest = tokens[0:10:2], tokens[1:10:2], tokens[10:]
            assert len(set(keys)) == len(set(values)) == 5
            assert all(1 <= key < 16 for key in keys) and all(16 <= value < 32 for value in values)
            asked = {i: token for i, token in enumerate(rest) if token != 0}
            assert len(asked) == len(set(asked.values())) == (5 if queries == "all" else queries)
            assert set(asked.values()) <= set(keys) and all(i % 2 == 0 for i in asked)
            assert judged(targets) == [10 + i for i in asked]
            assert all(targets[10 + i] == values[keys.index(key)] for i, key in asked.items())

    batch = make("associative_recall", queries=queries)
    check(batch)
    leaking = Batch(torch.where(batch.targets.roll(1, 1) > 0, batch.targets.roll(1, 1), batch.tokens), batch.targets)
    wrong_key = swapped(batch) if queries != 1 else foreign(batch)
    assert_rejects(check, shifted(batch), wrong_key, leaking, edited(batch, 0, batch.tokens[:, 2]))


def test_any_pair_may_be_asked_and_the_tightest_rows_are_full():
    batch = make("associative_recall", 500, queries=1)
    assert {tokens.index(max(tokens[10:])) for tokens, _ in rows(batch)} == {0, 2, 4, 6, 8}
    full = associative_recall(3, 12, pairs=3, vocabulary=8, generator=seeded())
    assert all(sorted(tokens[0:6:2]) == sorted(tokens[6::2]) == [1, 2, 3] for tokens, _ in rows(full))


def test_distances_of_queries_follow_the_power_law():
    """10,000 rows of one pair: how often each of 20 places is asked, within five deviations of its own count."""
    power = [u**-0.99 for u in range(1, 21)]
    expected = [10_000 * p / sum(power) for p in power]

    def check(places):
        counts = [places.count(2 + 2 * u) for u in range(20)]
        assert sum(counts) == 10_000
        assert all(abs(count - mean) < 5 * mean**0.5 for count, mean in zip(counts, expected, strict=True))

    batch = associative_recall(10_000, 42, pairs=1, vocabulary=8, generator=seeded())
    uniform = (2 + 2 * torch.randint(20, (10_000,), generator=seeded())).tolist()
    check([judged(targets)[0] for _, targets in rows(batch)])
    assert_rejects(check, uniform)


def test_the_first_pair_draws_first_and_is_asked_sooner():
    """Of 3 pairs and 20 places. Over 5,000 rows a mean place is certain to 0.2; first and last pair are 2 apart."""
    batch = associative_recall(5000, 46, pairs=3, vocabulary=8, generator=seeded())
    first, last = (sum(tokens.index(tokens[i], 6) for tokens, _ in rows(batch)) / 5000 for i in (0, 4))

    def check(places):
        assert places[1] - places[0] > 1

    check((first, last))
    assert_rejects(check, (last, first), (first, first))


def test_drawn_one_after_the_other():
    """Of weights 4, 3 and 3: the first index goes by all of them, the second by the two that are left."""
    drawn = _draw(torch.tensor([4.0, 3.0, 3.0]), 20_000, 2, seeded())
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    expected = {(0, 1): 4 / 10 * 3 / 6, (1, 0): 3 / 10 * 4 / 7, (1, 2): 3 / 10 * 3 / 7}

    def check(drawn):
        for pair, p in expected.items():
            assert abs(drawn.count(pair) - 20_000 * p) < 5 * (20_000 * p) ** 0.5

    drawn = [tuple(pair) for pair in drawn.tolist()]
    check(drawn)
    assert_rejects(check, [pair[::-1] for pair in drawn])


def test_repeated_rows():
    def check(batch):
        for tokens, targets in rows(batch):
            assert tokens[:8] == tokens[8:] and all(token in range(7, 20) for token in tokens)
            assert targets == [IGNORED] * 8 + tokens[9:] + [IGNORED]

    batch = make("repeated")
    check(batch)
    assert_rejects(check, shifted(batch), swapped(batch), foreign(batch), edited(batch, 3, 7))


def test_repeated_spares_the_special_tokens_and_takes_any_ids():
    assert set(repeated(100, 8, vocabulary=6, generator=seeded()).tokens.unique().tolist()) == {3, 4, 5}
    assert set(repeated(100, 8, vocabulary=[2, 40], generator=seeded()).tokens.unique().tolist()) == {2, 40}


# The needle in a text.

SOURCE = "".join(f"def function_{i}(x):\n    if x > {i}:\n        return x + {i}\n\n\n" for i in range(100))
LONGEST_LINE = max(map(len, SOURCE.splitlines()))


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "byte" else BPETokenizer.train([SOURCE, 'assert SECRET_CODE == "'], 300)


@pytest.fixture
def haystack(tokenizer):
    return torch.tensor(tokenizer.encode(SOURCE))


def text_of(batch, tokenizer):
    return tokenizer.decode(batch.tokens[0].tolist())


@pytest.mark.parametrize("depth", [0, 0.37, 0.5, 1])
@pytest.mark.parametrize("length", [200, 513])
def test_needle_in_text(tokenizer, haystack, length, depth):
    def check(batch):
        assert batch.tokens.shape == batch.targets.shape == (1, length) and batch.tokens[0, 0] == BOS
        text, targets = text_of(batch, tokenizer), batch.targets[0].tolist()
        (line,) = re.finditer(r'\nSECRET_CODE = "(\d{4})"\n', text)
        code, before, after = line[1], text[: line.start()], text[line.end() :]
        assert after.endswith(f'\nassert SECRET_CODE == "{code[:3]}') and text.count(code) == 1
        assert judged(targets) == list(range(length - 4, length)) and tokenizer.decode(targets[-4:]) == code
        after = after[: after.rindex("\nassert")]
        assert before + after in SOURCE, "the filler is one stretch of the source"
        assert "" in (before, after) or after[0] == "\n", "the line stands between two lines"
        assert abs(len(before) - depth * len(before + after)) <= (0 if depth in (0, 1) else LONGEST_LINE)

    batch = needle_in_text(tokenizer, haystack, length, depth, seed=3)
    check(batch)
    one_early = Batch(batch.tokens, batch.targets.roll(-1, 1))
    reversed_code = Batch(batch.tokens, torch.cat([batch.targets[:, :-4], batch.targets[:, -4:].flip(1)], 1))
    no_bos = Batch(batch.tokens.clone().index_fill_(1, torch.tensor([0]), EOS), batch.targets)
    elsewhere = needle_in_text(tokenizer, haystack, length, 0.9 if depth < 0.5 else 0.1, seed=3)
    assert_rejects(check, one_early, reversed_code, no_bos, elsewhere)


def test_the_line_goes_to_the_nearest_end_of_a_line():
    """By hand: in "ab\\ncd\\nef", places 0 to 8, a line may go to 0, 2, 5 and 8."""

    def check(nearest):
        source = torch.tensor(ByteTokenizer().encode("ab\ncd\nef"))
        assert [nearest(source, place, ByteTokenizer()) for place in range(9)] == [0, 0, 2, 2, 5, 5, 5, 8, 8]

    check(_nearest_line_end)
    assert_rejects(check, lambda source, place, tokenizer: place)
    assert _nearest_line_end(torch.tensor([70, 71, 72]), 1.0, ByteTokenizer()) == 0, "a single line has its two ends"


def test_needle_in_text_by_seed(tokenizer, haystack):
    shallow, again, deep, other = (
        needle_in_text(tokenizer, haystack, 200, depth, seed=seed) for depth, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(shallow.tokens, again.tokens)
    assert torch.equal(shallow.targets, deep.targets) and not torch.equal(shallow.targets, other.targets)
    assert sorted(text_of(shallow, tokenizer)) == sorted(text_of(deep, tokenizer)), "the same text in another order"


def test_special_tokens_of_the_haystack_are_left_out(tokenizer, haystack):
    documents = torch.cat([torch.tensor([BOS]), haystack[:300], torch.tensor([EOS, BOS]), haystack[300:]])
    expected = needle_in_text(tokenizer, haystack, 400, 0.5, seed=0)

    def check(tokens):
        assert torch.equal(needle_in_text(tokenizer, tokens, 400, 0.5, seed=0).tokens, expected.tokens)

    check(documents)
    check(documents.numpy().astype("uint16"))  # as a corpus is stored
    assert_rejects(check, torch.where(documents < 3, 10, documents))


def test_a_text_of_needle_and_question_alone():
    batch = needle_in_text(ByteTokenizer(), torch.tensor([], dtype=torch.int64), 50, 0.5, seed=0)
    assert re.fullmatch(r'\nSECRET_CODE = "(\d{3})\d"\n\nassert SECRET_CODE == "\1', text_of(batch, ByteTokenizer()))


# Steps of a run.


def test_a_batch_depends_on_seed_and_step_alone():
    def check(batch_of):
        drawn = {(seed, step): batch_of(seed, step) for seed in range(3) for step in range(3)}
        assert len({tuple(batch.tokens.flatten().tolist()) for batch in drawn.values()}) == 9, "two are the same"
        assert all(torch.equal(batch.tokens, batch_of(*key).tokens) for key, batch in drawn.items())

    def by(seed_of):
        return lambda seed, step: repeated(4, 32, vocabulary=300, generator=seeded(seed_of(seed, step)))

    check(lambda seed, step: task_batch("repeated", 4, 32, seed=seed, step=step, vocabulary=300))
    assert_rejects(check, by(lambda seed, step: seed + step), by(lambda seed, step: 2**32 * seed + step))


def test_batches_start_at_any_step():
    def check(resumed):
        whole = list(islice(batches("needle", 2, 20, seed=5, digits=2), 6))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[4:], islice(resumed, 2), strict=True))

    check(batches("needle", 2, 20, seed=5, start=4, digits=2))
    from_the_start, of_another_seed = {"seed": 5, "start": 0}, {"seed": 6, "start": 4}
    assert_rejects(check, *(batches("needle", 2, 20, digits=2, **at) for at in (from_the_start, of_another_seed)))


# Scores.


def test_accuracy_and_solved_by_hand():
    """Three judged positions in row 0, two right; one in row 1, right; none in row 2."""
    said = torch.tensor([[3, 1, 2, 0], [0, 0, 0, 3], [1, 1, 1, 1]])
    targets = torch.tensor([[3, 1, 0, IGNORED], [IGNORED, IGNORED, IGNORED, 3], [IGNORED] * 4])

    def check(scores):
        assert scores(torch.nn.functional.one_hot(said, 4).float(), targets) == (3 / 4, 1 / 2)

    def of_all_positions(logits, targets):
        return (logits.argmax(-1) == targets).float().mean().item(), solved(logits, targets)

    def rows_without_targets_count(logits, targets):
        right = (logits.argmax(-1) == targets) | (targets == IGNORED)
        return accuracy(logits, targets), right.all(1).float().mean().item()

    check(lambda logits, targets: (accuracy(logits, targets), solved(logits, targets)))
    assert_rejects(check, of_all_positions, rows_without_targets_count)


def test_one_row_is_scored_too():
    logits, targets = torch.eye(3), torch.tensor([0, 1, IGNORED])
    assert accuracy(logits, targets) == solved(logits, targets) == 1


# Refusals.


class PairTokenizer:
    """Two characters a token."""

    def encode(self, text):
        return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]

    def decode(self, ids):
        return "".join(token.to_bytes(2).decode().strip("\0") for token in ids)


def in_text(length=100, depth=0.5, tokenizer=None, haystack=SOURCE):
    tokens = torch.tensor(ByteTokenizer().encode(haystack))
    return needle_in_text(tokenizer or ByteTokenizer(), tokens, length, depth, seed=0)


REFUSED: dict[str, Callable] = {
    "memorise 0 is below 1: there must be something to copy": lambda: make("selective_copying", memorise=0),
    "vocabulary 3 is below 4: a blank, a marker": lambda: make("selective_copying", vocabulary=3),
    "length 9 is below 10: 5 data tokens": lambda: make("selective_copying", length=9),
    "digits 0 is below 1: there must be something to find": lambda: make("needle", digits=0),
    "vocabulary 2 is below 3: a marker": lambda: make("needle", vocabulary=2),
    "length 6 is below 7: the needle": lambda: make("needle", length=6),
    "length 2 is below 3: the needle": lambda: make("induction_heads", length=2),
    "depth 1.5 is outside": lambda: make("needle", depth=1.5),
    "depth nan is outside": lambda: make("needle", depth=float("nan")),
    "pairs 0 is below 1: there must be something to recall": lambda: make("associative_recall", pairs=0),
    "vocabulary 11 is below 12: 5 different keys": lambda: make("associative_recall", vocabulary=11),
    "length 19 is below 20: 5 pairs and 5 queries": lambda: make("associative_recall", length=19),
    "length 11 is below 12: 5 pairs and 1 queries": lambda: make("associative_recall", length=11, queries=1),
    'queries 6 must be "all" or a number from 1 to 5': lambda: make("associative_recall", queries=6),
    "queries 0 must be": lambda: make("associative_recall", queries=0),
    "queries 'some' must be": lambda: make("associative_recall", queries="some"),
    "vocabulary 4 leaves 1 ids to draw from": lambda: make("repeated", vocabulary=4),
    "vocabulary 2 leaves 0 ids to draw from": lambda: make("repeated", vocabulary=2),
    "length 2 is below 4: a repetition": lambda: make("repeated", length=2),
    "length 9 is odd, but the row is two equal halves: take 10": lambda: make("repeated", length=9),
    "depth -0.1 is outside": lambda: in_text(depth=-0.1),
    "length 49 is below 50: needle and question": lambda: in_text(length=49),
    "a haystack of 8 tokens cannot fill 50": lambda: in_text(haystack="x = 1\ny\n"),
    "the tokenizer ends": lambda: in_text(tokenizer=PairTokenizer()),
    "no task 'copy': take one of selective_copying, induction": lambda: task_batch("copy", 1, 8, seed=0, step=0),
    "seed -1 is below 0": lambda: task_batch("needle", 1, 8, seed=-1, step=0),
    "step -1 is below 0": lambda: task_batch("needle", 1, 8, seed=0, step=-1),
    "logits (2, 3, 5) and targets (2, 4) differ": lambda: accuracy(torch.zeros(2, 3, 5), torch.zeros(2, 4)),
    "no position is judged": lambda: solved(torch.zeros(1, 1, 5), torch.tensor([[IGNORED]])),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        REFUSED[message]()


def test_the_least_sizes_are_enough():
    """What is refused one smaller, of the cases above."""
    make("selective_copying", length=10, vocabulary=4)
    make("needle", length=7, vocabulary=3)
    make("associative_recall", length=20, vocabulary=12)
    make("associative_recall", length=12, queries=1)
    make("repeated", length=4, vocabulary=5)


def test_the_docstrings_examples_hold():
    results = doctest.testmod(sys.modules["minijamba.tasks"])
    assert results.attempted and not results.failed


def test_the_rows_drawn_in_the_docstrings_are_of_their_task():
    """Tokens and targets of every drawing, answered by the task's solver."""

    def check(drawing, name):
        tokens, targets = (re.findall(r"\d+|\.", line.split("  ")[0]) for line in drawing)
        tokens, targets = ([IGNORED if x == "." else int(x) for x in row] for row in (tokens, targets))
        assert len(tokens) == len(targets) and judged(targets)
        assert_solvable(Batch(torch.tensor([tokens]), torch.tensor([targets])), name)

    for name, task in TASKS.items():
        tokens, targets = re.search(r"tokens: +(.+)\n +targets: +(.+)\n", task.__doc__).groups()
        check((tokens, targets), name)
        assert_rejects(lambda wrong, name=name: check(wrong, name), (tokens, re.sub(r"\d", "0", targets)))
