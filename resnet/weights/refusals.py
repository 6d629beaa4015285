"""How weights are refused: one line, in which text from a file can do no harm."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from resnet.errors import ResNetError


class WeightsError(ResNetError):
    """Weights that cannot be used. The message is one line: the file, what was given, what was expected."""

    def __init__(self, file: Path, fault: str) -> None:
        super().__init__(f"{clean(str(file))}: {fault}")


def clean(text: str) -> str:
    """The text on one line: what cannot be printed becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str) -> str:
    """Text from a file, fit for a message."""
    return clean(text[:120])


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, and a mark if there are more."""
    first = [short(name) for name in islice(names, most + 1)]
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")
