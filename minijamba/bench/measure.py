"""How a component is measured: the same numbers for all sides, the same results, and then what each side takes."""

import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context

import torch
from torch import Tensor

PATIENCE = 10.0  # seconds; a side that has taken so long for one figure is not called again for it
IN_A_ROW = 20
PEERS = ("mamba_ssm", "causal_conv1d")  # packages of kernels that a side can seem to run and not run
SPECIAL = 16  # exponentials a clock and multiprocessor, on all GPUs since Volta (CUDA programming guide)
# Sides differ by the rounding of their results and of what they store in between, each time by half of the last bit:
# 2^-9 in bfloat16, 2^-12 in float16. In float32 sums of thousands of terms in another order weigh more.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class CannotCapture(Exception):
    """This program, or this device, cannot record a step in a CUDA graph; the run goes on without the figure."""


@dataclass(frozen=True)
class Setting:
    """What all sides of a run have in common."""

    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int]

    def normals(self) -> Callable[..., Tensor]:
        """A function that draws normal numbers of a shape, the same ones in each run on a device."""
        generator = torch.Generator(self.device).manual_seed(0)
        return partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Side:
    """A program that computes the component.

    run:      (*arguments) -> y.
    layout:   what it makes of an argument (b, t, ...), time last; None when it takes them as they are.
    packages: those of PEERS whose functions it must run, and no other's.
    compiled: it compiles for one shape.
    decoder:  prompt (b, t, d) -> a function token (b, 1, d) -> y that continues it.
    """

    name: str
    run: Callable[..., Tensor]
    layout: Callable[[Tensor], Tensor] | None = None
    packages: frozenset[str] = frozenset()
    compiled: bool = False
    decoder: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None

    def lay_out(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self.layout(tensor) if self.layout and tensor.dim() == 3 else tensor for tensor in tensors]

    def common(self, tensors: list[Tensor]) -> list[Tensor]:
        """Results in the layout that all sides share."""
        return [tensor.mT if self.layout and tensor.dim() == 3 else tensor for tensor in tensors]


def time_last(tensor: Tensor) -> Tensor:
    """(b, t, c) -> (b, c, t), contiguous."""
    return tensor.mT.contiguous()


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device unless the user asks for something else.

    cases: name of a measure -> pairs of batch and steps.
    """

    dtype: str
    repeats: int
    sizes: dict[str, int]
    sides: list[str]
    cases: dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class Component:
    """What can be compared.

    plans:     for "cpu" and "cuda".
    sides:     name -> what imports and returns it; ImportError, with the reason, where it cannot run.
    reference: a side that computes the definition in float64.
    arguments: (setting, batch, steps) -> the numbers that all sides get, by name; the result has the first one's shape.
    least:     (setting, batch, steps) -> what every program has to do at least: "bytes", "exponentials".
    is_layer:  it decodes, and its weights alone are larger than a GPU's cache.
    """

    name: str
    help: str
    plans: dict[str, Plan]
    sides: dict[str, Callable[[Setting], Side]]
    reference: Callable[[Setting], Side]
    arguments: Callable[[Setting, int, int], dict[str, Tensor]]
    least: Callable[[Setting, int, int], dict[str, int]] | None = None
    is_layer: bool = False

    @property
    def measures(self) -> list[str]:
        """Names of those `MEASURES` that can be taken of it."""
        lacks = ([] if self.is_layer else ["decode"]) + ([] if self.least else ["floor"])
        return [name for name in MEASURES if name.split()[0] not in lacks]


@dataclass(frozen=True)
class Run:
    """One run of the benchmark, whose rows `MEASURES` yields."""

    component: Component
    setting: Setting
    sides: list[Side]
    repeats: int
    card: dict[str, float]
    left_out: dict[str, str]

    def arguments(self, batch: int, steps: int) -> dict[str, Tensor]:
        return self.component.arguments(self.setting, batch, steps)


def available(component: Component, names: list[str], setting: Setting) -> tuple[list[Side], dict[str, str]]:
    """The sides that run here, and why others do not."""
    sides, left_out = [], {}
    for name in names:
        try:
            sides.append(component.sides[name](setting))
        except ImportError as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}")
    return sides, left_out


# What is called: each function prepares a call of a side, which returns tensors in the side's layout.


def forward(side: Side, arguments: list[Tensor]) -> Callable[[], list[Tensor]]:
    own = side.lay_out(arguments)

    @torch.no_grad()
    def call():
        return [side.run(*own)]

    return call


def forward_backward(side: Side, arguments: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Returns y and the gradients of all arguments."""
    x = arguments[0]
    generator = torch.Generator(x.device).manual_seed(1)
    dy = torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)  # exact in every dtype
    own, (dy,) = [tensor.detach().requires_grad_() for tensor in side.lay_out(arguments)], side.lay_out([dy])

    def call():
        y = side.run(*own)
        return [y.detach(), *torch.autograd.grad(y, own, dy)]

    return call


def decode(side: Side, arguments: list[Tensor]) -> Callable[[], list[Tensor]]:
    """One more token after a prompt, the prompt's first: it stays the same from call to call, the state moves on."""
    (prompt,) = arguments
    token = prompt[:, :1].contiguous()
    with torch.no_grad():
        step = side.decoder(prompt)

    @torch.no_grad()
    def call():
        return [step(token)]

    return call


def decode_in_graph(side: Side, arguments: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The decoding step recorded once and replayed. Raises: CannotCapture."""
    if arguments[0].device.type != "cuda":
        raise CannotCapture("CUDA graphs need a GPU")
    call, stream, graph = decode(side, arguments), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            outputs = call()
    except RuntimeError as error:
        raise CannotCapture(f"cannot be captured in a CUDA graph: {error}") from error

    def replay():
        graph.replay()
        return outputs

    replay.keeps = call  # the graph reads and writes its tensors
    return replay


# What is measured.


def times(work, clock, run: Run, batch: int, steps: int) -> Iterator[dict]:
    """Milliseconds of each side; the sides take turns, in changing order."""
    arguments = list(run.arguments(batch, steps).values())
    rotate = clock is in_a_row and not run.component.is_layer
    sets = 1 + _flush_bytes(run.setting.device) // sum(argument.nbytes for argument in arguments) if rotate else 1
    calls, ran = ready(run, work, arguments, sets)
    seconds = {name: [] for name in calls}
    for repeat in range(run.repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            if sum(seconds[name]) < PATIENCE:
                seconds[name].append(clock(calls[name], run.setting.device))
    for name, measured in seconds.items():
        yield {"side": name, **_summary([1e3 * second for second in measured]), **ran[name]}


def _summary(milliseconds: list[float]) -> dict:
    return {
        "milliseconds": statistics.median(milliseconds),
        "fastest": min(milliseconds),
        "slowest": max(milliseconds),
        "calls": len(milliseconds),
    }


def ready(run: Run, work, arguments: list[Tensor], sets: int = 1) -> tuple[dict, dict]:
    """For each side its calls on equal sets of arguments, the first made once and checked; and what it ran."""
    calls, ran, expected = {}, {}, None
    for side in run.sides:
        try:
            calls[side.name], outputs, functions = _first_call(side, work, arguments)
        except CannotCapture as error:
            run.left_out[f"{side.name}, {work.__name__}"] = str(error)
            continue
        expected = expected or outputs
        for error in map(relative_error, outputs, expected):
            if not error < TOLERANCES[run.setting.dtype]:
                first = next(iter(calls))
                raise RuntimeError(f"{side.name} differs from {first} by {error:.1e}: the times would mean nothing")
        calls[side.name] += [work(side, [a.clone() for a in arguments]) for _ in range(sets - 1)]
        ran[side.name] = {"ran": functions} if functions else {}
    return calls, ran


def _first_call(side: Side, work, arguments: list[Tensor]) -> tuple[list[Callable], list[Tensor], list[str]]:
    def prepare_and_call():
        call = work(side, arguments)
        return [call], side.common(call())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compiling warns a lot
        (calls, outputs), functions = watch(prepare_and_call)
    packages = {function.split(".")[0] for function in functions}
    if packages != side.packages:
        wanted, found = (", ".join(sorted(names)) or "no peer's package" for names in (side.packages, packages))
        raise RuntimeError(f"{side.name} should run functions of {wanted} and ran those of {found}")
    return calls, outputs, functions


def watch(call: Callable) -> tuple[object, list[str]]:
    """What a call returns, and the functions of PEERS that it ran, as "mamba_ssm.selective_scan_fn"."""
    seen, before = set(), sys.getprofile()
    if not any(package in sys.modules for package in PEERS):
        return call(), []

    def note(frame, event, _):
        package, name = frame.f_globals.get("__name__", "").split(".")[0], frame.f_code.co_name
        if event == "call" and package in PEERS and name[0] != "<":
            seen.add(f"{package}.{name}")

    sys.setprofile(note)
    try:
        return call(), sorted(seen)
    finally:
        sys.setprofile(before)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dtype=wide)
    return (norm(actual - expected) / norm(expected)).item()


def errors(work, run: Run, batch: int, steps: int) -> Iterator[dict]:
    """Relative to the norm, against the definition in float64."""
    arguments = run.arguments(batch, steps)
    exact = work(run.component.reference(run.setting), [argument.double() for argument in arguments.values()])()
    names = ["y", *(f"the gradient of {name}" for name in arguments)][: len(exact)]
    for side in run.sides:
        outputs = side.common(work(side, list(arguments.values()))())
        for name, output, expected in zip(names, outputs, exact, strict=True):
            error = relative_error(output.double(), expected)
            yield {"measure": f"error of {name}", "side": side.name, "error": error}


def floors(run: Run, batch: int, steps: int) -> Iterator[dict]:
    """Milliseconds that the forward pass takes at the card's own rates, as rows beside the sides'."""
    for kind, amount in run.component.least(run.setting, batch, steps).items():
        if rate := run.card.get(f"{kind}_per_second"):
            yield {"measure": "forward", "side": f"floor of {kind}", "milliseconds": 1e3 * amount / rate}


def peaks(work, run: Run, batch: int, steps: int) -> Iterator[dict]:
    """Bytes at the peak of a call, above what was in use before it: results count, arguments do not.

    On a CPU the whole process is watched, so that each side gets one of its own.
    """
    for side in run.sides:
        if run.setting.device.type == "cuda":
            call = work(side, list(run.arguments(batch, steps).values()))
            yield {"side": side.name, "bytes": _peak_of_allocator(call, run.setting.device)}
        else:
            case = run.component.name, side.name, run.setting, work, batch, steps
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                yield {"side": side.name, "bytes": process.submit(_peak_of_new_process, *case).result()}


def _peak_of_allocator(call: Callable, device: torch.device) -> int:
    call()  # loads libraries, compiles kernels
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_new_process(component: str, name: str, setting: Setting, work, batch: int, steps: int) -> int:
    from . import COMPONENTS

    component = COMPONENTS[component]
    side = component.sides[name](setting)

    def prepare(steps):
        return work(side, list(component.arguments(setting, batch, steps).values()))

    # The first call loads libraries. What compiles, compiles for one length; others show it with a short sequence.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(steps if side.compiled else 32)()
    call = prepare(steps)
    with PeakOfProcess() as peak:
        call()
    return peak.bytes


class PeakOfProcess:
    """Watches the process's resident memory from a thread, a thousand times a second."""

    def __enter__(self):
        import psutil

        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self._highest, self._process.memory_info().rss) - self._before


# Clocks: seconds of a call.


def alone(calls: list[Callable], device: torch.device) -> float:
    """A single call that finds the device idle, so that launching it counts, and a GPU's cache without its data."""
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush(device)
    start.record()
    calls[0]()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def in_a_row(calls: list[Callable], device: torch.device) -> float:
    """The mean of many calls, one right after the other. They go round several sets of arguments that together are
    larger than a GPU's cache."""
    _synchronise(device)
    start = time.perf_counter()
    for i in range(IN_A_ROW):
        calls[i % len(calls)]()
    _synchronise(device)
    return (time.perf_counter() - start) / IN_A_ROW


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flush(device: torch.device) -> None:
    _flush_buffer(device).sum()  # reads: what is written would have to leave the cache while the call is timed
    torch.cuda.synchronize(device)


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.zeros(_flush_bytes(device) // 4, device=device)


def _flush_bytes(device: torch.device) -> int:
    """Bytes that push everything else out of a GPU's cache: four times its size."""
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


MEASURES = {
    "forward": partial(times, forward, alone),
    "forward in a row": partial(times, forward, in_a_row),
    "floor of forward": floors,
    "forward + backward": partial(times, forward_backward, alone),
    "forward + backward in a row": partial(times, forward_backward, in_a_row),
    "peak memory": partial(peaks, forward),
    "peak memory of forward + backward": partial(peaks, forward_backward),
    "decode step": partial(times, decode, alone),
    "decode step in a row": partial(times, decode, in_a_row),
    "decode step in a CUDA graph": partial(times, decode_in_graph, in_a_row),
    "error of forward": partial(errors, forward),
    "error of forward + backward": partial(errors, forward_backward),
}


# The machine.


def card(device: torch.device, numbers: int = 2**29) -> dict[str, float]:
    """A GPU's own rates: bytes a second, read and written, of a copy; exponentials a second by its highest clock."""
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    copy = torch.empty_like(source)
    seconds = statistics.median(alone([lambda: copy.copy_(source)], device) for _ in range(20))
    facts = {"bytes_per_second": 2 * source.nbytes / seconds}
    facts["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        clocks = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        facts["clock_hertz"] = 1e6 * max(map(float, clocks))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        print(f"the floor of exponentials is left out: nvidia-smi does not tell the highest clock ({error})")
        return facts
    facts["exponentials_per_second"] = SPECIAL * facts["multiprocessors"] * facts["clock_hertz"]
    return facts


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of one large product of random square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [alone([lambda: a @ b], device) for _ in range(12)]
    return 2 * size**3 / statistics.median(seconds[2:])


def warn_of_company() -> None:
    """Threads wait for each other: a busy machine slows whatever is measured many times over."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"other programs keep {load:.1f} cores busy: the figures will be off, best run this alone")
