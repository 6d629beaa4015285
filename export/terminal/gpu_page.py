"""The record of a run on a GPU as a page of tables."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from export.base.errors import printable
from export.base.machine import machine_line
from export.terminal.benchmark_tables import CUDA_COLUMNS

_TIMES = {
    "us": ("median_us", ".2f"),
    "20 %": ("p20_us", ".2f"),
    "80 %": ("p80_us", ".2f"),
    "floor us": ("floor_us", ".2f"),
    "us / floor": ("over_floor", ".2f"),
}


def gpu_page(record: Mapping[str, Any], source: str) -> str:
    """Markdown that shows what is there so far; `source` is the file that holds the record."""
    text, steps = io.StringIO(), record["steps"]
    machine = record["machine"]
    print(f"# {machine['gpu']}, {record['date']}\n", file=text)
    print(f"{machine_line(machine)}; {machine['target']}, {machine['multiprocessors']} multiprocessors", file=text)
    print(f"{machine['driver']}\n" if machine["driver"] else "", file=text)
    verdict = "passed" if record["passed"] else "not passed, or not done"
    print(f"`{record['command']}`, {record['limit_s']} s: **{verdict}**; all numbers are in {source}.\n", file=text)
    rows = [
        (
            step["step"],
            step["what"],
            step["status"],
            f"{step['seconds']:.0f}" if "seconds" in step else "",
            _found(step),
        )
        for step in steps
    ]
    _print_table(("step", "", "outcome", "s", "found"), rows, text)
    results = [(step["step"], result) for step in steps for result in step.get("found", {}).get("results", [])]
    if results:
        print("\n## Networks\n", file=text)
        print(
            "Measured by CUDA events, every way in turn, its input on the device in channels_last; S is the floor of",
            file=text,
        )
        print("a level's kernels at the rates measured here.\n", file=text)
        headings = ("step", "model", "batch", "provider", *CUDA_COLUMNS)
        _print_table(headings, [row for step, result in results for row in _network_rows(step, result)], text)
    for step in steps:
        found = step.get("found", {})
        if "networks" in found:
            board = found["floors_of"]
            print("\n## Kernels\n", file=text)
            print("Measured in a CUDA graph, with inputs in rotation that L2 does not hold.", file=text)
            print(f"Floors are predicted, of {board or 'no board'}; what is furthest above comes first.\n", file=text)
            _print_table(("problem", *_TIMES, "bound by", ""), _kernel_rows(found["rows"]), text)
            print(file=text)
            graphs = {(r["model"], r["batch"], row["provider"]): row for _, r in results for row in r["rows"]}
            _print_table(("model", "batch", "kernels us", "floors us", "in one graph us"), _sums(found, graphs), text)
    return text.getvalue().rstrip() + "\n"


def _found(step: Mapping[str, Any]) -> str:
    """In a few words."""
    words = []
    if "tests" in step:
        words.append(f"{step['tests']['passed']} tests passed, {len(step['tests']['failed'])} failed")
    if "errors" in step:
        words.append(f"{step['errors']} errors of memory")
    if "kernels" in step:
        words.append(f"{step['kernels']} kernels")
    return "; ".join(filter(None, [*words, step["reason"]]))


def _network_rows(step: str, result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in result["rows"]:
        cells = _cells(row, CUDA_COLUMNS)
        name = (
            row["provider"] if row["status"] == "measured" else f"{row['provider']}: {row['status']}, {row['reason']}"
        )
        yield step, result["model"], str(result["batch"]), name, *cells


def _kernel_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in sorted(rows, key=lambda row: -float(row.get("over_floor", 0))):
        yield row["problem"], *_cells(row, _TIMES), row.get("bound_by", ""), row["reason"]


def _sums(
    found: Mapping[str, Any], graphs: Mapping[tuple[str, int, str], Mapping[str, Any]]
) -> Iterator[tuple[str, ...]]:
    """The kernels of a network one by one, and together in its CUDA graph."""
    for entry in found["networks"]:
        model, batch = entry["model"], entry["batch"]
        graph = graphs.get((model, batch, "ours c3"), {})
        together = f"{1e3 * graph['median_ms']:.1f}" if "median_ms" in graph else ""
        floors = f"{entry['floor_us']:.1f}" if "floor_us" in entry else ""
        yield model, str(batch), f"{entry['kernels_us']:.1f}", floors, together


def _cells(row: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for key, spec in columns.values():
        yield format(row[key], spec) if row.get(key) is not None else ""


def _print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]], text: io.StringIO
) -> None:
    print(f"| {' | '.join(headings)} |", file=text)
    print(f"|{'---|' * len(headings)}", file=text)
    for row in rows:
        print(f"| {' | '.join(printable(cell).replace('|', '/') for cell in row)} |", file=text)
