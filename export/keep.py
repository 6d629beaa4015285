"""What to leave in a wider type: what names stand for, and few enough with which a network passes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence

from export.base.errors import ExportError

AUTO = "auto"


def chosen(flag: str, layers: Mapping[str, Collection[str]], patterns: Collection[str]) -> frozenset[str]:
    """The layers that `patterns` stand for: by their own names, or those of modules they hold or are part of.

    Args:
        flag: that the patterns were given with.
        layers: name -> modules of the user's model that it computes.
        patterns: names of modules.

    Raises:
        ExportError: a name that stands for none.
    """
    found: set[str] = set()
    for pattern in patterns:
        named = {
            layer
            for layer, modules in layers.items()
            if any(module == pattern or module.startswith(f"{pattern}.") for module in (layer, *modules))
        }
        if not named:
            near = difflib.get_close_matches(pattern, layers, n=3) or list(layers)[:3]
            hint = f"expected a layer, or a module with layers, such as {', '.join(near)}"
            raise ExportError(f"{flag}: no layer is called {pattern!r}; {hint}")
        found |= named
    return frozenset(found)


def fewest(names: Sequence[str], passes: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """A set that passes and from which none can be left out, of names taken in their order.

    Bisection finds how many of the first it takes; then each of them that is not needed is given back.

    Args:
        names: the most likely first.
        passes: whether the network is good enough with these; with all of them it is taken to be.
    """
    if passes(frozenset()):
        return frozenset()
    low, high = 0, len(names)  # it fails with the first `low` and passes with the first `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(frozenset(names[:middle])) else (middle, high)
    kept = set(names[:high])
    for name in reversed(names[: high - 1]):  # the last one is needed
        if passes(frozenset(kept - {name})):
            kept.remove(name)
    return frozenset(kept)
