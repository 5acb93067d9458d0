"""Work in a process of its own: its memory is wholly given back, and where it fails the run goes on."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import torch

PATIENCE = 1200.0  # seconds without a word, after which the process is ended
FAREWELL = 30.0  # seconds that it has to end by itself after its last word
NO_ROOM = "out of memory"
KERNELS = 2**28  # bytes of a GPU that are set aside for kernels: they load with their first call, past the allocator


class Broke(Exception):
    """Work did not come to its end; what the exception says is why."""


def apart(work: Callable[..., Iterator], *arguments) -> Iterator:
    """What the generator `work` yields in a process of its own, with as many threads as this one.

    Work and arguments are pickled: a function of a module, and what it yields.
    Raises: Broke with the reason if it failed or the process ended; ImportError if something is not installed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()
    try:
        while (message := _next(receiver, process))[0] == "yielded":
            yield message[1]
        kind, said = message
    finally:
        receiver.close()
        process.join(FAREWELL if sys.exc_info()[0] is None else 0)
        if process.is_alive():
            process.kill()
            process.join()
    if kind == "missing":
        raise ImportError(said)
    if kind == "failed":
        raise Broke(said)


def _next(receiver, process) -> tuple[str, object]:
    try:
        if not receiver.poll(PATIENCE):
            return "failed", f"nothing came for {PATIENCE:.0f} seconds"
        return receiver.recv()
    except EOFError:
        process.join()
        return "failed", f"the process ended with exit status {process.exitcode}"


def _work(sender, threads: int, work: Callable[..., Iterator], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        for content in work(*arguments):
            sender.send(("yielded", content))
        sender.send(("done", None))
    except ImportError as error:
        sender.send(("missing", str(error)))
    except Exception as error:  # whatever another program raises: it becomes a row
        traceback.print_exc()
        sender.send(("failed", reason(error)))


def reason(error: Exception) -> str:
    """Why something failed, in a line."""
    text = str(error).strip().splitlines() or [""]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_ROOM in text[0]:
        return NO_ROOM
    return f"{type(error).__name__}: {text[0][:300]}"


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Memory:
    """A process's memory on a device: on a GPU limited to `gib` GiB in all, the CUDA context and kernels counted.

    On a CPU, nothing limits it, and its highest use is that of the whole process.
    """

    def __init__(self, device: torch.device, gib: float | None = None) -> None:
        self.device, self.bytes = device, None if gib is None else int(gib * 2**30)
        if device.type == "cuda" and gib is not None:
            self._limit()

    def _limit(self) -> None:
        small = torch.ones(64, 64, device=self.device, dtype=torch.bfloat16)
        small @ small  # loads what every program needs; it is no part of the allocator's memory
        del small
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(self.device)[1]
        share = self._left / total
        if share <= 0:
            raise ValueError(f"{self.bytes:,} bytes are less than what is in use on {self.device} without a model")
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)

    @property
    def context(self) -> int:
        """Bytes in use that are not the allocator's: the CUDA context and kernels, and what other processes hold."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    @property
    def _left(self) -> int:
        """Bytes of the limit that the allocator may take."""
        return self.bytes - self.context - (KERNELS if self.device.type == "cuda" else 0)

    @property
    def room(self) -> int:
        """Bytes that a model and all beside it can take in an empty process."""
        from ..budget import available_memory

        free = available_memory(self.device)
        return free if self.bytes is None else min(free, self._left)

    def start(self) -> None:
        """From now on `peak` counts; what earlier work left is given back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        """Most bytes since the start, as the allocator reserved them, and the context; on a CPU, of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + self.context
        return host_memory()["highest"]


def host_memory() -> dict[str, int]:
    """Bytes of this process on the host: the highest that was resident, and how much of files and shared is now."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        import resource

        return {"highest": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.endswith("kB")}
    names = {"highest": "VmHWM", "files": "RssFile", "shared": "RssShmem"}
    return {name: 1024 * int(sizes[key]) for name, key in names.items() if key in sizes}
