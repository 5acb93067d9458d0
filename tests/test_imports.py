"""Imports go downward only, and importing the package is quick and needs little."""

import ast
import subprocess
import sys
from pathlib import Path

import minijamba
from minijamba.testing import assert_rejects

PACKAGE = Path(minijamba.__file__).parent
# From the ground up; a module imports only from rows below its own. "minijamba" is the package's own __init__.
LEVELS = [
    "families testing plots rungs tokenizer ngram packed",
    "config fused_overlap data stored",
    "fused_norm fused_glu fused_loss fused_linear stream",
    "fused_attention quantize",
    "norm scan conv moe mlp loss cache budget tasks writing",
    "attention mamba packed_files random_weights",
    "block",
    "model",
    "generate checkpoint train evaluate probes",
    "bench harness recipe adapters",
    "run study conformance",
    "minijamba",
    "tour doctor assignment",
    "cli",
    "__main__",
]
LEVEL = {name: row for row, names in enumerate(LEVELS) for name in names.split()}
LAZY = ["transformers", "triton", "matplotlib", "safetensors", "tqdm", "psutil", "tokenizers", "huggingface_hub"]


def imports(path):
    """Dotted names that a file imports, relative ones written out: "minijamba.scan", "torch.nn"."""
    folder = ["minijamba", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, name.name]) for name in node.names)


def module_of(dotted):
    """ "minijamba.scan.naive.scan" -> "scan"; a name of the package's own __init__ -> "minijamba"."""
    name = (dotted.split(".") + ["minijamba"])[1]
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "minijamba"


def graph():
    """Module -> modules that it imports; a folder's files count as one module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "minijamba")
        ours = {module_of(dotted) for dotted in imports(path) if dotted.split(".")[0] == "minijamba"}
        found.setdefault(name, set()).update(ours - {name})
    return found


def test_imports_go_downward():
    def check(modules):
        assert modules.keys() <= LEVEL.keys(), f"give a level to {modules.keys() - LEVEL.keys()}"
        upward = [(name, other) for name in modules for other in modules[name] if LEVEL[other] >= LEVEL[name]]
        assert not upward, f"upward imports: {upward}"

    check(graph())
    assert_rejects(check, {"scan": {"model"}}, {"mlp": {"moe"}}, {"block": {"minijamba"}}, {"unknown": set()})


def test_the_reader_of_imports_sees_every_form():
    assert graph()["block"] >= {"attention", "mamba", "norm", "config"}
    assert module_of("minijamba.scan.naive") == "scan" and module_of("minijamba.preset") == "minijamba"


def test_matplotlib_and_triton_stay_in_their_files():
    importers = {"matplotlib": set(), "triton": set()}
    for path in PACKAGE.rglob("*.py"):
        for package in {dotted.split(".")[0] for dotted in imports(path)} & importers.keys():
            importers[package].add(path.relative_to(PACKAGE))
    assert {path.parts[0] for path in importers["matplotlib"]} == {"plots"}
    assert all(path.stem.startswith("fused") for path in importers["triton"])


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_model_needs_torch_numpy_and_einops_only():
    def check(imported):
        run(f"import sys; sys.modules.update(dict.fromkeys({LAZY})); {imported}")

    check("import torch, minijamba as mj; mj.Jamba(mj.preset('tiny'))(torch.tensor([[1, 2, 3]]))")
    assert_rejects(check, "import minijamba.plots; minijamba.plots.matplotlib", "import tqdm")


def test_importing_adds_under_half_a_second_to_torch():
    timer = "import time, torch; start = time.perf_counter(); import minijamba; print(time.perf_counter() - start)"
    assert min(float(run(timer)) for _ in range(3)) < 0.5


def test_functions_keep_their_names_whatever_is_imported_first():
    """generate and budget are modules too; the package's names must stay the functions."""
    run(
        "import minijamba.generate, minijamba.budget, minijamba as mj\n"
        "assert callable(mj.generate) and callable(mj.budget) and callable(mj.load)"
    )
