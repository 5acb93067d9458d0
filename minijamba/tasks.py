"""Synthetic tasks that tell models that carry a state from models that look back, and the score of an answer.

A recurrent model answers from a state of fixed size, so it must choose what to keep; attention keeps every token, but
must find the one that is asked for. Each task asks for one of these skills and for nothing else. All of them return a
`Batch` whose targets stand where the logits that predict them stand: logits[:, i] is judged by targets[:, i].

| task | what it asks for |
|---|---|
| `selective_copying` | keep the data, skip the blanks: a state whose step depends on its input |
| `induction_heads` | what came after this token the last time? |
| `associative_recall` | the same for many keys at once: the state must have room for all pairs |
| `needle`, `needle_in_text` | one fact over a long distance |
| `repeated` | say the same again, in any language model: where its induction heads are found |
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from .data import IGNORED, Batch
from .tokenizer import BOS, SPECIAL_TOKENS

BLANK = 0  # of selective copying and associative recall; a task's marker is the last token of its vocabulary
GAP_POWER = 0.01  # of the distance to a query in associative recall; 1 would be a uniform distance
CODE_DIGITS = 4  # of the needle in a text


def selective_copying(
    batch: int, length: int = 4096, *, vocabulary: int = 16, memorise: int = 16, generator: torch.Generator
) -> Batch:
    """Data tokens at random places among blanks; then as many markers, at which the data must come out in order.

        tokens:   0 3 0 0 2 2 0 | 5 5 5        vocabulary 6: blank 0, data 1 to 4, marker 5
        targets:  . . . . . . . | 3 2 2        (. is IGNORED)

    Args:
        length: of the whole row, markers included; at least 2 `memorise`.
        vocabulary: blank and marker included, so that data tokens are 1 to vocabulary - 2.
        generator: of the CPU; the same state draws the same batch.
    Returns: tokens and targets (b, t).
    Raises: ValueError if length, vocabulary or memorise is too small.
    Source: Mamba (arXiv 2312.00752), section 4.1.1 and appendix E.1, whose settings are the defaults. They do not say
        whether length and vocabulary count the markers: here they do.
    """
    _require("memorise", memorise, 1, "there must be something to copy")
    _require("vocabulary", vocabulary, 4, "a blank, a marker and two data tokens must fit, so take more")
    _require("length", length, 2 * memorise, f"{memorise} data tokens and as many markers must fit: memorise fewer?")
    context = length - memorise
    data = torch.randint(BLANK + 1, vocabulary - 1, (batch, memorise), generator=generator)
    places = _draw(torch.ones(context), batch, memorise, generator).sort().values
    tokens = torch.full((batch, length), BLANK).scatter(1, places, data)
    tokens[:, context:] = vocabulary - 1
    targets = _nothing_judged(batch, length)
    targets[:, context:] = data
    return Batch(tokens, targets)


def induction_heads(batch: int, length: int = 256, *, vocabulary: int = 16, generator: torch.Generator) -> Batch:
    """Random tokens, among them one marker; at the end it comes again, and what followed it must be said.

        tokens:   2 0 7 4 1 1 3 7              vocabulary 8: marker 7
        targets:  . . . . . . . 4              (. is IGNORED)

    It is the needle of one token at a depth drawn for every row. Arguments, returns and errors as there.

    Source: Mamba (arXiv 2312.00752), section 4.1.2 and appendix E.1: 16 tokens, trained at length 256 and tested from
        2^6 to 2^20. Here the 16 include the marker.
    """
    return needle(batch, length, digits=1, vocabulary=vocabulary, generator=generator)


def needle(
    batch: int,
    length: int,
    *,
    depth: float | None = None,
    vocabulary: int = 16,
    digits: int = 4,
    generator: torch.Generator,
) -> Batch:
    """A marker and the needle's tokens somewhere in random filler; the marker at the end, and the needle again.

        tokens:   2 0 7 4 1 1 3 0 7 4          vocabulary 8: marker 7; 2 digits: 4 1
        targets:  . . . . . . . . 4 1          (. is IGNORED)

    The digits but the last are given after the marker, as a language model that writes them would see them. Filler and
    needle are drawn alike from 0 to vocabulary - 2: only the marker tells them apart.

    Args:
        length: at least 2 digits + 1.
        depth: 0 puts the needle first in the row, 1 right before the question; None draws a depth for every row.
        vocabulary: marker included.
        generator: of the CPU; the same state draws the same batch.
    Returns: tokens and targets (b, t).
    Raises: ValueError if a size is too small or depth is outside [0, 1].
    """
    _require("digits", digits, 1, "there must be something to find")
    _require("vocabulary", vocabulary, 3, "a marker and two other tokens must fit, so take more")
    _require("length", length, 2 * digits + 1, "the needle, a marker and the answer must fit: take fewer digits?")
    marker, question = vocabulary - 1, length - digits
    deepest = question - digits - 1
    if depth is None:
        place = torch.randint(deepest + 1, (batch, 1), generator=generator)
    else:
        place = torch.full((batch, 1), round(_checked_depth(depth) * deepest))
    tokens = torch.randint(marker, (batch, length), generator=generator).scatter(1, place, marker)
    answer = tokens.gather(1, place + 1 + torch.arange(digits))
    tokens[:, question] = marker
    tokens[:, question + 1 :] = answer[:, :-1]
    targets = _nothing_judged(batch, length)
    targets[:, question:] = answer
    return Batch(tokens, targets)


def associative_recall(
    batch: int,
    length: int,
    *,
    pairs: int,
    vocabulary: int = 8192,
    queries: int | str = "all",
    generator: torch.Generator,
) -> Batch:
    """Multi-query associative recall: pairs of key and value, then keys among blanks, whose values must be said.

        tokens:   2 8 4 7 | 0 0 4 0 2 0        vocabulary 10: blank 0, keys 1 to 4, values 5 to 9
        targets:  . . . . | . . 7 . 8 .        (. is IGNORED)

    Keys, and values too, differ within a row. After the pairs, every second place may hold a query; one pair after the
    other draws the u-th of them, of those still free, with

        P(u) proportional to u^(GAP_POWER - 1)        u = 1, 2, ...

    so that many are asked soon and some late, as words come back in a text.

    Args:
        length: at least 2 pairs + 2 queries.
        pairs: at most vocabulary // 2 - 1.
        queries: how many of the pairs are asked, each once: "all", or a number, and then which ones is drawn.
        generator: of the CPU; the same state draws the same batch.
    Returns: tokens and targets (b, t).
    Raises: ValueError if length or vocabulary is too small for the pairs, or queries is not among them.
    Source: Zoology (arXiv 2312.04927), as its authors' program (HazyResearch/zoology) makes the rows of its figure 2,
        blanks between the queries included. A number of queries is ours.
    """
    _require("pairs", pairs, 1, "there must be something to recall")
    asked_pairs = pairs if queries == "all" else queries
    if not (isinstance(asked_pairs, int) and 1 <= asked_pairs <= pairs):
        raise ValueError(f'queries {queries!r} must be "all" or a number from 1 to {pairs}, the number of pairs')
    _require("vocabulary", vocabulary, 2 * pairs + 2, f"{pairs} different keys must fit in its half: take fewer pairs?")
    least = 2 * pairs + 2 * asked_pairs
    _require("length", length, least, f"{pairs} pairs and {asked_pairs} queries take two tokens each: take fewer?")
    first_value = vocabulary // 2
    keys = 1 + _draw(torch.ones(first_value - 1), batch, pairs, generator)
    values = first_value + _draw(torch.ones(vocabulary - first_value), batch, pairs, generator)
    asked = _draw(torch.ones(pairs), batch, asked_pairs, generator).sort().values
    steps = torch.arange(1, (length - 2 * pairs) // 2 + 1)
    places = 2 * pairs + 2 * _draw(steps ** (GAP_POWER - 1), batch, asked_pairs, generator)

    tokens = torch.full((batch, length), BLANK).scatter(1, places, keys.gather(1, asked))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    return Batch(tokens, _nothing_judged(batch, length).scatter(1, places, values.gather(1, asked)))


def repeated(batch: int, length: int, *, vocabulary: int | Sequence[int], generator: torch.Generator) -> Batch:
    """Random tokens, then the same again; the second half is judged.

        tokens:   9 4 6 5 | 9 4 6 5
        targets:  . . . . | 4 6 5 .            (. is IGNORED)

    Its first token is not: nothing announces that the repetition begins. No model can have learned such a row, so what
    it predicts in the second half it has looked up in the first: the work of induction heads.

    Args:
        length: even, at least 4.
        vocabulary: ids to draw from, such as a range, or a number v for those of 0 to v - 1 that are not special.
        generator: of the CPU; the same state draws the same batch.
    Returns: tokens and targets (b, t).
    Raises: ValueError for an odd or too short length, or fewer than 2 ids.
    Source: Olsson et al., In-context Learning and Induction Heads (arXiv 2209.11895).
    """
    ids = torch.tensor(range(len(SPECIAL_TOKENS), vocabulary) if isinstance(vocabulary, int) else vocabulary)
    if len(ids) < 2:
        raise ValueError(f"vocabulary {vocabulary} leaves {len(ids)} ids to draw from, and 2 are needed: take more")
    _require("length", length, 4, "a repetition of two tokens must fit, so take more")
    if length % 2:
        raise ValueError(f"length {length} is odd, but the row is two equal halves: take {length + 1}")
    half = length // 2
    tokens = ids[torch.randint(len(ids), (batch, half), generator=generator)].repeat(1, 2)
    targets = _nothing_judged(batch, length)
    targets[:, half:-1] = tokens[:, half + 1 :]
    return Batch(tokens, targets)


def needle_in_text(tokenizer, haystack_tokens: Tensor | np.ndarray, length: int, depth: float, *, seed: int) -> Batch:
    """One row for a language model of Python: a line with a secret in the midst of source, asked for at the end.

        <bos> ...source... SECRET_CODE = "7481" ...source... assert SECRET_CODE == "748
                                                                        targets:  7481

    The line goes between two lines of the source, or to its very start or end, whichever is nearest to the depth.

    Args:
        tokenizer: one token a digit, as both of ours have.
        haystack_tokens: (t,) integers, longer than the row; a stretch of it is drawn. Special tokens are left out: to a
            model trained on packed documents, a <bos> would mean that what it has read does not count.
        length: of the row, exactly.
        depth: 0 puts the line right behind <bos>, 1 right before the question.
        seed: draws the secret and the stretch, the same ones at every depth.
    Returns: tokens and targets (1, t).
    Raises: ValueError if depth is outside [0, 1], the length holds no needle and question, the haystack is too short,
        or the tokenizer joins digits.
    """
    generator = torch.Generator().manual_seed(seed)
    code = "".join(str(digit) for digit in torch.randint(10, (CODE_DIGITS,), generator=generator).tolist())
    line = torch.tensor(tokenizer.encode(f'\nSECRET_CODE = "{code}"\n'))
    question = torch.tensor(tokenizer.encode(f'\nassert SECRET_CODE == "{code}'))
    pieces = [tokenizer.decode([token]) for token in question[-CODE_DIGITS:].tolist()]
    if pieces != list(code):
        raise ValueError(f"the tokenizer ends {code} in the pieces {pieces}: take one with a token for every digit")
    _require("length", length, len(line) + len(question), "needle and question must fit, so take more")

    room = length - len(line) - len(question)
    source = torch.from_numpy(np.array(haystack_tokens, np.int64))
    source = source[source >= len(SPECIAL_TOKENS)]
    if len(source) < room:
        raise ValueError(f"a haystack of {len(source)} tokens cannot fill {room}: take more text or a shorter length")
    start = int(torch.randint(len(source) - room + 1, (), generator=generator))
    source = source[start : start + room]
    cut = _nearest_line_end(source, _checked_depth(depth) * room, tokenizer)
    row = torch.cat([torch.tensor([BOS]), source[:cut], line, source[cut:], question])
    targets = _nothing_judged(1, length)
    targets[:, -CODE_DIGITS:] = row[-CODE_DIGITS:]
    return Batch(row[None, :-1], targets)


def _nearest_line_end(source: Tensor, place: float, tokenizer) -> int:
    """The start, the end, or a place before a token that begins with a newline, whichever is nearest to `place`."""
    newlines = [token for token in source.unique().tolist() if tokenizer.decode([token]).startswith("\n")]
    ends = torch.isin(source, torch.tensor(newlines)).nonzero().flatten().tolist()
    return min([0, *ends, len(source)], key=lambda end: abs(end - place))


TASKS: dict[str, Callable[..., Batch]] = {
    task.__name__: task for task in (selective_copying, induction_heads, associative_recall, needle, repeated)
}


def task_batch(name: str, batch: int, length: int, *, seed: int, step: int, **settings) -> Batch:
    """The batch of one step: it depends on seed and step alone, so that a run can go on where it stopped.

        task_batch("associative_recall", 8, 64, seed=0, step=100, pairs=4)

    Args:
        name: of a task in TASKS; `settings` are its own keyword arguments.
        seed, step: at least 0.
    Raises: ValueError naming the tasks if there is no such task, and what the task raises.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: take one of {', '.join(TASKS)}")
    _require("seed", seed, 0, "take one from 0 on")
    _require("step", step, 0, "steps are counted from 0")
    # torch reads 32 bits of a seed: of seed * 2**32 + step only the step would be left.
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    return TASKS[name](batch, length, generator=torch.Generator().manual_seed(mixed), **settings)


def batches(name: str, batch: int, length: int, *, seed: int, start: int = 0, **settings) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ... without end; see `task_batch`."""
    return (task_batch(name, batch, length, seed=seed, step=step, **settings) for step in count(start))


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of the judged positions where the likeliest token is the target.

    Args:
        logits: (b, t, v), or (t, v) of one row.
        targets: (b, t), or (t,).
    Raises: ValueError if the shapes disagree or no position is judged.

    >>> logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    >>> accuracy(logits, torch.tensor([[1, 1, IGNORED]]))
    0.5
    """
    right, judged = _judge(logits, targets)
    return right.sum().item() / judged.sum().item()


def solved(logits: Tensor, targets: Tensor) -> float:
    """Share of the rows with every judged position right; rows without any do not count. Otherwise as `accuracy`."""
    right, judged = _judge(logits, targets)
    return (right | ~judged).all(-1)[judged.any(-1)].float().mean().item()


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in batch or time")
    judged = targets != IGNORED
    if not judged.any():
        raise ValueError("no position is judged: all targets are IGNORED, so there is no share to give")
    return logits.argmax(-1) == targets, judged


def _require(name: str, value: int, least: int, why: str) -> None:
    if value < least:
        raise ValueError(f"{name} {value} is below {least}: {why}")


def _checked_depth(depth: float) -> float:
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} is outside [0, 1]: give the share of the text that stands before the needle")
    return depth


def _draw(weights: Tensor, batch: int, number: int, generator: torch.Generator) -> Tensor:
    """Indices (b, number) of weights (n,), none twice in a row, in the order drawn."""
    return weights.expand(batch, -1).multinomial(number, generator=generator)


def _nothing_judged(batch: int, length: int) -> Tensor:
    return torch.full((batch, length), IGNORED)
