"""The benchmark's records as tables; each ends with the line that a person can act on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.table import Table

from export.base.machine import machine_line
from export.terminal.commands import typed
from export.terminal.console import print_table
from export.terminal.flags import in_flags

BUSY = 1.5  # between the 80 % and the 20 % quantile of eager's times; an idle machine shows 1.0 to 1.1
_COLUMNS = {
    "median ms": ("median_ms", ".3f"),
    "20 %": ("p20_ms", ".3f"),
    "80 %": ("p80_ms", ".3f"),
    "img/s": ("images_per_second", ".1f"),
    "x eager": ("times_eager", ".2f"),
    "x compile": ("times_compiled", ".2f"),
    "error ratio": ("error_ratio", ".2f"),
}
CUDA_COLUMNS = {
    **{heading: _COLUMNS[heading] for heading in ("median ms", "20 %", "80 %")},
    "img/s": ("images_per_second", ",.0f"),
    **{heading: _COLUMNS[heading] for heading in ("x eager", "x compile")},
    "S ms": ("floor_ms", ".3f"),
    "time / S": ("over_floor", ".2f"),
    "error ratio": _COLUMNS["error ratio"],
}
_LEVELS = {
    "a": "eager",
    "i": "vendor's convolutions, each with one pointwise kernel",
    "b": "convolution + bias + residual + ReLU",
    "c1": "b; stem with its pool; head",
    "c2": "c1; projection in the block's last convolution",
    "c3": "c2; 3x3 and 1x1 back to back",
}


def print_comparison(record: Mapping[str, Any]) -> str:
    """Print on stdout a table per batch size, and under it why a provider was not timed; returns the last line."""
    results = record["results"]
    first = results[0]
    print(machine_line(record["machine"]))
    if first["device"] == "cuda":
        print(
            f"measured here: {first['peak_tflops']:.0f} TFLOP/s in {first['precision']}, "
            f"{first['bandwidth_gb_s']:.0f} GB/s; S is the floor of a level's kernels at these rates"
        )
        print("every input is on the device in channels_last and copying it is not timed; cudnn.benchmark on, TF32 off")
    else:
        print(f"{first['threads']} threads for torch, ONNX Runtime and OpenVINO alike")
    print(
        "error ratio: a provider's error against the float64 model over that of unfused operators; too large, not timed"
    )
    for result in results:
        _print_rows(result)
    wrong = dict.fromkeys(row["provider"] for result in results for row in result["rows"] if row["status"] == "failed")
    if wrong:
        return f"FAILED, not equal to the eager model or broken: {', '.join(wrong)}; do not deploy that"
    best, spread = [], max(result["rows"][0]["p80_ms"] / result["rows"][0]["p20_ms"] for result in results)
    for result in results:
        row = min((row for row in result["rows"] if "median_ms" in row), key=lambda row: row["median_ms"])
        best.append(f"{result['model']} batch {result['batch']}: {row['provider']}, {row['times_eager']:.2f} x eager")
    print(f"fastest: {'; '.join(best)}")
    if spread > BUSY:
        return (
            f"the machine was busy: eager's times spread by {spread:.1f} times; run this again with nothing beside it"
        )
    return f"next: {typed('export')} --model {first['model']} --precision {first['precision']}"


def _print_rows(result: Mapping[str, Any]) -> None:
    title = f"{result['model']}, {result['precision']}, batch {result['batch']}, {result['device']}"
    columns = CUDA_COLUMNS if result["device"] == "cuda" else _COLUMNS
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("provider")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.values()]
        table.add_row(row["provider"], *cells, style="red" if row["status"] == "failed" else "")
    print_table(table)
    for row in result["rows"]:
        if row["reason"]:
            print(f"{row['provider']}: {row['status']}: {in_flags(row['reason'])}")


def print_floors(record: Mapping[str, Any]) -> str:
    """Print on stdout what one image costs at each level of fusion; returns the last line."""
    for result in record["results"]:
        title = f"{result['model']}, {result['precision']}, one image: what its kernels must compute, read and write"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("level")
        table.add_column("")
        for heading in ("GFLOP", "weights MB", "activations MB", "kernels"):
            table.add_column(heading, justify="right")
        for row in result["rows"]:
            numbers = (row["flops"] / 1e9, row["weight_bytes"] / 1e6, row["activation_bytes"] / 1e6)
            formatted = [format(number, spec) for number, spec in zip(numbers, (".2f", ".1f", ".1f"), strict=True)]
            table.add_row(row["level"], _LEVELS[row["level"]], *formatted, str(row["kernels"]))
        print_table(table)
    last = record["results"][-1]
    eager, fused = last["rows"][0], last["rows"][-1]
    saved = eager["activation_bytes"] / fused["activation_bytes"]
    return (
        f"{last['model']} moves {saved:.1f} times fewer activations at {fused['level']} than eager; "
        f"next: {typed('benchmark')} --model {last['model']}"
    )


def print_export_step(record: Mapping[str, Any]) -> str:
    """Print on stdout how long each step took; returns the last line."""
    machine = record["machine"]
    facts = f"{machine['cpus']} CPUs, {platform.machine()}, torch {machine['torch']}"
    for result in record["results"]:
        table = Table("step", "median s", "ratio", title=f"{result['model']}, {result['rounds']} rounds; {facts}")
        for row in result["rows"]:
            table.add_row(row["step"], f"{row['median_s']:.2f}", f"{row['times_torch']:.2f}")
        print_table(table)
    return f"next: {typed('export')} --model {record['results'][-1]['model']}"


def print_tool(record: Mapping[str, Any]) -> str:
    """Print on stdout what an export took in each checkout; returns the last line."""
    return _print_programs(record, "checkout", lambda result: f"export {' '.join(result['arguments'])}")


def print_quick(record: Mapping[str, Any]) -> str:
    """Print on stdout what a quick export took beside a bare one; returns the last line."""
    return _print_programs(record, "program", lambda result: f"{result['model']}, a process each")


def _print_programs(record: Mapping[str, Any], what: str, title_of: Callable[[Mapping[str, Any]], str]) -> str:
    machine, ratios = record["machine"], []
    for result in record["results"]:
        title = f"{title_of(result)}: median of {result['rounds']}; {machine['cpus']} CPUs"
        table = Table(what, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("CPU s", "wall s", "peak MB"):
            table.add_column(heading, justify="right")
        for row in result["rows"]:
            table.add_row(row[what], f"{row['cpu_s']:.1f}", f"{row['wall_s']:.1f}", f"{row['peak_mb']:.0f}")
        ratio = result["ratios"]
        table.add_row("ratio", *(f"{ratio[figure]:.2f}" for figure in ("cpu_s", "wall_s", "peak_mb")))
        print_table(table)
        ratios.append(
            f"{result['model']} {ratio['cpu_s']:.2f} CPU, {ratio['wall_s']:.2f} wall, {ratio['peak_mb']:.2f} memory"
        )
    return f"the second in units of the first: {'; '.join(ratios)}"
