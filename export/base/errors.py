"""The two ways an export can be refused. Both messages are one line that a person can act on."""

from __future__ import annotations

import platform
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_OURS = ("export", "kernels", "resnet", "scripts", "resnet_deploy")


class ExportError(ValueError):
    """The model, an input or a file is not what was expected; says what was given and what was expected.

    Args:
        message: one line. What it quotes, as a name out of a file, may not be: what cannot be printed is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this project: from its checkout, or where there is only the package."""
    is_checkout = (_ROOT / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if is_checkout else f"pip install 'resnet-deploy[{extra}]'"


class MissingDependency(ExportError):
    """An optional package is not installed, or does not load.

    Args:
        package: the module that could not be imported.
        extra: the extra of this project that installs it.
        error: what the import raised.
    """

    def __init__(self, package: str, extra: str, error: ImportError) -> None:
        absent = isinstance(error, ModuleNotFoundError) and f"{package}.".startswith(f"{error.name}.")
        if not absent:
            reason = f"is installed but does not load: {first_line(error)}"
        elif platform.machine() == "aarch64":  # where PyPI has other packages than a Jetson needs
            reason = "is not installed; docs/deploy.md has the command for a Jetson"
        else:
            reason = f"is not installed; install it with: {how_to_install(extra)}"
        super().__init__(f"{package} {reason}")


def is_mendable(error: BaseException) -> bool:
    """Whether whoever started a program can mend what ended it: anything else is a mistake of this project."""
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, ImportError):
        return is_foreign(error)
    return isinstance(error, (ExportError, MemoryError)) or _is_torch_out_of_memory(error)


def is_foreign(error: ImportError) -> bool:
    """Whether what cannot be imported is a package of others."""
    return (error.name or "").partition(".")[0] not in _OURS


def _is_torch_out_of_memory(error: BaseException) -> bool:
    """PyTorch has no MemoryError: on a GPU it has a type of its own, on a CPU a RuntimeError that says so."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def printable(text: str) -> str:
    """A text with what would end a line or steer a terminal escaped, as in a Python literal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line that can be printed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0]) if lines else type(error).__name__
