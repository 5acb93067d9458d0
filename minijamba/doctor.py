"""What is installed, what this machine has, which rung of each component runs here, and what to do about the rest."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from .rungs import fastest, why_no_kernels

COMPONENTS = ("scan", "conv", "attention", "moe")
REMEDIES = {
    "torch numpy einops safetensors tokenizers huggingface_hub tqdm matplotlib jupyterlab psutil": "pip install -e .",
    "pytest pytest-xdist hypothesis nbval transformers mambapy ruff": "pip install -e '.[test]', to run the tests",
    "mamba-ssm causal-conv1d": "pip install --no-build-isolation -e '.[peers]' where there is nvcc, to compare speeds",
    "triton": "pip install triton on Linux x86-64, for kernels; the parallel rungs do without",
}


def report():
    """A line for each package, device and component, and a remedy beside each thing that is missing."""
    sections = {"packages": _packages(), "machine": _machine(), "rungs": _rungs()}
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _packages():
    yield _row("python", platform.python_version())
    for packages, remedy in REMEDIES.items():
        for package in packages.split():
            yield _row(package, _version(package) or f"absent: {remedy}")


def _row(name, value):
    return f"{name:<16} {value}"


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine():
    yield _row("cpu", f"{torch.get_num_threads()} threads, {platform.machine()}, {platform.system()}")
    if _version("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        yield _row("memory", _free(memory.available, memory.total))
    for index in range(torch.cuda.device_count()):
        yield _row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {_free(*torch.cuda.mem_get_info(index))}")
    if torch.backends.mps.is_available():
        yield _row("mps", "found, but untried")
    if not torch.cuda.is_available():
        yield _row("cuda", f"absent: {_without_cuda()}")


def _free(free, total):
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _without_cuda():
    if torch.version.cuda is None:
        return "this torch is built without it; where there is an NVIDIA GPU, install a build with CUDA (pytorch.org)"
    return f"this torch is built for CUDA {torch.version.cuda} but finds no GPU; see whether nvidia-smi lists one"


def _rungs():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for component in COMPONENTS:
        rungs = import_module(f".{component}", __package__).rungs(device)
        best = fastest(rungs, device)
        yield _row(component, f"{best} (by name also: {', '.join(rung for rung in rungs if rung != best)})")
    if reason := why_no_kernels(device):
        yield _row("kernels", f"absent: {reason}")
    yield _row("decoding", "two caches: keys and values, and the Mamba state")
