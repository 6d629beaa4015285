"""The two ways an export can be refused. Both messages are one line that a person can act on."""

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
