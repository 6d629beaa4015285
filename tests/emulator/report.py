"""What goes wrong in a launch, by kind and place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class Stopped(Exception):
    """A block cannot go on; why is in its report."""


@dataclass
class Report:
    """Defects by (kind, instruction and line of source), with an example of each: block and detail."""

    defects: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, where: str, block: int = -1, detail: str = "") -> None:
        self.defects[kind, where] += 1
        self.examples.setdefault((kind, where), (block, detail))

    @property
    def hazards(self) -> list[str]:
        """One line for each defect that is no note: a note is formally wrong and harmless on the hardware there is."""
        return [
            f"{kind}: {where}, {count} times, first in block {self.examples[kind, where]}"
            for (kind, where), count in self.defects.items()
            if not kind.startswith("note")
        ]
