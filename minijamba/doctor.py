"""What is installed, what this machine has, which rung of each component runs here, and what to do about the rest."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

COMPONENTS = ("scan", "conv", "attention", "moe")
PACKAGES = {
    "torch numpy einops safetensors tokenizers huggingface_hub tqdm matplotlib jupyterlab psutil": "pip install -e .",
    "pytest pytest-xdist hypothesis nbval transformers mambapy": "pip install -e '.[test]', to run the tests",
    "mamba-ssm causal-conv1d": "pip install --no-build-isolation -e '.[peers]' on a machine with nvcc, to compare speeds",
}


def report():
    """The whole report as text: a line a package, device and component, and a remedy beside each thing missing."""
    sections = {"packages": _packages(), "machine": _machine(), "rungs": _rungs()}
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _packages():
    yield f"{'python':<16} {platform.python_version()}"
    for names, remedy in PACKAGES.items():
        for name in names.split():
            yield f"{name:<16} {_version(name) or f'absent: {remedy}'}"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        yield f"{'triton':<16} {_version('triton') or 'absent: pip install triton, for the fused kernels'}"
    else:
        yield f"{'triton':<16} {_version('triton') or 'absent: it is made for Linux on x86-64 only; the parallel rungs run'}"


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine():
    yield f"{'cpu':<16} {torch.get_num_threads()} threads, {platform.machine()}, {platform.system()}"
    if _version("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        yield f"{'memory':<16} {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"{f'cuda:{index}':<16} {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if torch.backends.mps.is_available():
        yield f"{'mps':<16} available"
    if not torch.cuda.is_available():
        yield f"{'cuda':<16} {_why_no_cuda()}"


def _why_no_cuda():
    if torch.version.cuda is None:
        return "absent: this torch is built without CUDA; on a machine with an NVIDIA GPU install a build with it (pytorch.org)"
    return f"absent: torch is built for CUDA {torch.version.cuda} but finds no GPU; check that nvidia-smi lists one"


def _rungs():
    for component in COMPONENTS:
        *slower, fastest = import_module(f".{component}", __package__)._RUNGS
        yield f"{component:<16} {fastest} (by name also: {', '.join(slower)})"
    yield f"{'decoding':<16} two caches: keys and values, and the Mamba state"
