"""What a refusal must be: one sentence that names what is wrong."""

import re
from collections.abc import Callable


def refusal(action: Callable, *arguments, error: type[Exception] = ValueError) -> str:
    """The message of a refusal; AssertionError if nothing was refused."""
    try:
        action(*arguments)
    except error as refused:
        assert type(refused) is error
        return str(refused)
    raise AssertionError("nothing was refused")


def assert_names(message: str, words: list[str]) -> None:
    """One sentence that names the words in their order."""
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words)), message), message
