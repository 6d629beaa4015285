"""The two ways an export can be refused. Both messages are one line that a person can act on. No PyTorch."""

from __future__ import annotations


class ExportError(ValueError):
    """The model, an input or a file is not what was expected; says what was given and what was expected."""


class MissingDependency(ExportError):
    """An optional package is not installed.

    Args:
        package: the module that could not be imported.
        extra: the extra of this project that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install -e '.[{extra}]'")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
