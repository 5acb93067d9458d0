"""From files into a model's memory: blocks that threads read ahead, moved and packed as they arrive.

    file  --threads-->  ring of buffers on the host  --copies, beside the computation-->  device  --pack-->  its place

A block is a run of a tensor's numbers, whole rows where they are to be packed. The ring is no larger than the largest
tensor, so that a CPU's memory holds the model and one tensor at most, and a GPU's the model and at most BESIDE bytes.
It packs four blocks of a tensor at a time: to tell it what to do takes as long for one, and the thread that does so
must keep up with all those that read.
"""

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .packed import DTYPES as PACKED_DTYPES
from .packed import pack_rows
from .stored import DTYPES, Stored

BLOCK = 2**24  # bytes at most, but for a row that is longer: large enough for the speed of any disk
LEAST = 2**16  # bytes, below which a block costs more than its content
THREADS = 16  # at most; one does not reach the speed of a fast disk
JOINED = 4  # blocks that a GPU packs at a time
ON_DEVICE = 3  # buffers of so many blocks that it holds beside the model
BESIDE = 2**31  # bytes that are set aside on a GPU for buffers and packing of blocks of BLOCK bytes


@dataclass
class LoadReport:
    """Where the time of loading went, in seconds. All but `reading`, the sum over threads, add up to `total`."""

    bytes: int = 0  # read from files
    threads: int = 0
    headers: float = 0.0  # reading config and headers, checking them, making the model's memory
    reading: float = 0.0  # of the threads, checksums included
    waiting: float = 0.0  # for the next block to be read
    placing: float = 0.0  # handing blocks to the device, packing; on a GPU also waiting for it at the end
    total: float = 0.0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + perf_counter() - start)


class Place(NamedTuple):
    """Where a tensor belongs: as it is into `values`, or, where there are scales, packed, of `inputs` numbers a row."""

    values: Tensor
    scales: Tensor | None = None
    inputs: int = 1
    dtype: torch.dtype | None = None  # of the model; what is packed is rounded to it first

    @torch.no_grad()
    def put(self, start: int, numbers: Tensor) -> None:
        """Its numbers from number `start` on, flat and whole rows, in any float dtype."""
        if self.scales is None:
            self.values.view(-1)[start : start + len(numbers)].copy_(numbers)
            return
        bits = next(bits for bits, kinds in PACKED_DTYPES.items() if kinds[0] == self.values.dtype)
        rows = numbers.view(-1, self.inputs).to(self.dtype)
        first = start // self.inputs
        for part, packed in zip((self.values, self.scales), pack_rows(rows, bits), strict=True):
            part[first : first + len(rows)].copy_(packed)


class Block(NamedTuple):
    """`count` numbers of a tensor, from number `start` on."""

    name: str
    stored: Stored
    start: int
    count: int
    checksum: str | None = None
    into: Tensor | None = None  # where it belongs, if it can be read there at once
    joined: bool = False  # with the next one, to be packed together

    @property
    def nbytes(self) -> int:
        return self.count * self.stored.itemsize


class Checksums(NamedTuple):
    """What the files of a checkpoint must hold: tensor -> the CRC-32 of each block of so many bytes, in hexadecimal.

    Of what the standard library has, crc32 is the fastest by a factor of two, and it finds every flipped byte.
    """

    block: int
    tensors: dict[str, list[str]]


def checksum(content) -> str:
    return f"{crc32(content):08x}"


def read_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(THREADS, cores))


def block_bytes(largest: int) -> int:
    """Of the blocks in which tensors are read, the largest of which has so many bytes: all threads have some."""
    return min(BLOCK, max(LEAST, largest // (2 * read_threads())))


def fill(
    places: dict[str, Place], stored: dict[str, Stored], device: torch.device, report: LoadReport,
    checksums: Checksums | None = None, advance=lambda nbytes: None,
) -> None:  # fmt: skip
    """Reads every tensor into its place, in the order in which they lie in the files.

    Raises: ValueError for a tensor that differs from its checksum, or cannot be packed since it is not finite.
    """
    order = sorted(places, key=lambda name: (stored[name].file, stored[name].begin))
    largest = max((stored[name].nbytes for name in order), default=0)
    size = block_bytes(largest)
    plan = [
        block for name in order for block in _blocks(name, stored[name], size, places[name], device, checksums)
    ]  # fmt: skip
    with closing(_stream(plan, device, report)) as blocks:
        for block, numbers in blocks:
            with report.timed("placing"):
                if block.into is None:
                    places[block.name].put(block.start, numbers)
            advance(numbers.nbytes)
    with report.timed("placing"):
        _check_finite(places, stored)


def _blocks(
    name: str, stored: Stored, size: int, place: Place, device: torch.device, checksums: Checksums | None
) -> Iterator[Block]:
    total, row, dtype = math.prod(stored.shape), place.inputs, DTYPES[stored.dtype]
    sums = checksums.tensors[name] if checksums else None
    step = max(1, (checksums.block if checksums else size) // dtype.itemsize // row) * row
    direct = device.type == "cpu" and place.scales is None and place.values.dtype == dtype
    for i, start in enumerate(range(0, total, step)):
        count = min(step, total - start)
        into = place.values.view(-1)[start : start + count] if direct else None
        joined = device.type == "cuda" and (i + 1) % JOINED > 0 and start + count < total
        yield Block(name, stored, start, count, sums[i] if sums else None, into, joined)


def _check_finite(places: dict[str, Place], stored: dict[str, Stored]) -> None:
    packed = [name for name, place in places.items() if place.scales is not None]
    if not packed:
        return
    finite = torch.stack([places[name].scales.isfinite().all() for name in packed]).tolist()
    if wrong := [stored[name] for name, fine in zip(packed, finite, strict=True) if not fine]:
        raise ValueError(
            f"{wrong[0].file}: {wrong[0].name} holds numbers that are not finite, which cannot be packed: load it "
            f"without quantize, or download it again"
        )


class _Buffer:
    """Memory of the host that a block is read into; pinned where a GPU copies from it by itself."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned = size, pinned
        self.memory: Tensor | None = None  # made by the thread that reads first: to pin it takes time
        self.copied: torch.cuda.Event | None = None  # when what was read last is on the device

    def read(self, block: Block) -> tuple[Tensor, float]:
        """The block's numbers, and the seconds that it took."""
        if self.copied is not None:
            self.copied.synchronize()
        start = perf_counter()
        numbers = block.into
        if numbers is None:
            if self.memory is None:
                self.memory = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned)
            numbers = self.memory[: block.nbytes].view(DTYPES[block.stored.dtype])
        block.stored.read_into(numbers, block.start)
        if block.checksum is not None and checksum(numbers.view(torch.uint8).numpy()) != block.checksum:
            raise ValueError(
                f"{block.stored.file}: {block.stored.name} is not what was written, by its checksum: copy the file "
                f"again, or make the checkpoint anew"
            )
        return numbers, perf_counter() - start


def _stream(plan: list[Block], device: torch.device, report: LoadReport) -> Iterator[tuple[Block, Tensor]]:
    """Every block, or the first of those that are joined, and its numbers on the device until more are asked for."""
    threads = read_threads()
    size = max((block.nbytes for block in plan), default=0)
    ring = deque(_Buffer(size, device.type == "cuda") for _ in range(min(2 * threads, len(plan))))
    moves = _Moves(device, size) if device.type == "cuda" else None
    report.threads = threads
    pending, joined = deque(), []

    def next_blocks() -> Iterator[tuple[Block, Tensor]]:
        block, buffer, reading = pending.popleft()
        with report.timed("waiting"):
            numbers, seconds = reading.result()
        report.reading += seconds
        report.bytes += block.nbytes
        ring.append(buffer)
        joined.append(block)
        if moves is not None:
            with report.timed("placing"):
                numbers = moves.move(numbers, buffer, sum(before.nbytes for before in joined[:-1]))
        if not block.joined:
            yield joined[0], numbers
            joined.clear()

    pool = ThreadPoolExecutor(threads)
    try:
        for block in plan:
            if not ring:
                yield from next_blocks()
            buffer = ring.popleft()
            pending.append((block, buffer, pool.submit(buffer.read, block)))
        while pending:
            yield from next_blocks()
    finally:
        pool.shutdown(cancel_futures=True)
    if moves is not None:
        with report.timed("placing"):
            torch.cuda.synchronize(device)


class _Moves:
    """Copies to a GPU on a stream of their own: while one block is packed, the next ones are on their way."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.ring = deque(torch.empty(JOINED * size, dtype=torch.uint8, device=device) for _ in range(ON_DEVICE))
        self.free: deque[torch.cuda.Event] = deque()  # when each of the ring was used last, the oldest first
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def move(self, numbers: Tensor, buffer: _Buffer, begin: int) -> Tensor:
        """Behind what is in the current buffer up to byte `begin`, or into the next buffer; all that is then there."""
        work = torch.cuda.current_stream(self.device)
        if begin == 0:
            self.free.append(work.record_event())  # everything that was done with the buffer before
            if len(self.free) == ON_DEVICE:
                self.stream.wait_event(self.free.popleft())
            self.ring.rotate(1)
        there = self.ring[0][: begin + numbers.nbytes].view(numbers.dtype)
        with torch.cuda.stream(self.stream):
            there[-len(numbers) :].copy_(numbers, non_blocking=True)
            buffer.copied = self.stream.record_event()
        work.wait_event(buffer.copied)
        return there
