"""The course as a programming assignment: stubs of a Jamba, a judge in pytest, a trained checkpoint to end with.

`template` holds the solved assignment. What a student writes stands between two comments:

    # <solution>
    return self.weight * normalised
    # </solution>

The student's copy has `raise NotImplementedError` there; the instructor's has the code without the comments.
"""

import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checkpoint import SHIPPED, locate

TEMPLATE = Path(__file__).parent / "template"
SOLUTION = re.compile(r"^( *)# <solution>\n(.*?)^ *# </solution>\n", flags=re.MULTILINE | re.DOTALL)


def write_assignment(folder: str | os.PathLike, solutions: bool = False) -> None:
    """Write the assignment: README.md, my_jamba/ (stubs, or with `solutions` their code), tests/ and checkpoint/.

    It is written to a hidden folder beside `folder` that takes its place at the end. `pytest` in it is the judge.

    Args: folder, absent or empty; the folders above it are made.
    Raises: ValueError if it holds anything, or where the trained checkpoint is missing, as beside an installed package.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give one that is absent or empty, so that no work is lost")
    checkpoint = locate(SHIPPED)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        whole = Path(beside) / folder.name
        for file in template_files():
            target = whole / file.relative_to(TEMPLATE)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8")
            target.write_text(solved(text) if solutions else stubbed(text), encoding="utf-8")
        shutil.copytree(checkpoint, whole / "checkpoint")
        if folder.exists():
            folder.rmdir()
        whole.rename(folder)


def template_files() -> list[Path]:
    return sorted(file for file in TEMPLATE.rglob("*") if file.suffix in (".py", ".md", ".ini"))


def solved(text: str) -> str:
    """The text without the comments around its solutions."""
    return SOLUTION.sub(r"\2", text)


def stubbed(text: str) -> str:
    """The text with `raise NotImplementedError` in the place of each solution.

    >>> stubbed("def f():\\n    # <solution>\\n    return 1\\n    # </solution>\\n")
    'def f():\\n    raise NotImplementedError\\n'
    """
    return SOLUTION.sub(r"\1raise NotImplementedError\n", text)
