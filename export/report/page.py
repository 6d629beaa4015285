"""report.html: one page, nothing outside it, of what was exported and why it can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from export.report import numbers
from export.report.lanes import LANES, boxes
from export.report.plot import COSTS, LAYERS, VALUES, Plot, Z, plots
from export.runtime.parity.accuracy import RETAINED_PERCENT
from export.runtime.parity.rungs import EMULATED, EQUAL, NO_VERDICT, WRONG

REPORT_FILE = "report.html"
_TEMPLATE = "page.html.j2"
_CLASSES_SHOWN = 10
# kind of a check of 8 bits -> what it is of, and the unit of its error
_KINDS = {
    "scale": ("scales", "in steps that are missing to the calibrated range"),
    "weight": ("weights and quantised biases", "in steps from the float64 value"),
    "bias": ("biases in floating point", "which are exact"),
    "normalise": ("the input, normalised", "which is exact"),
    "between": ("values between and behind the layers", "in relative error"),
}
_OUTPUTS = ("outputs that are not quantised", "in roundoffs of the largest value")


def render(
    manifest: Mapping[str, Any],
    parity: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    graph: Mapping[str, Any],
    command: str = "",
    skipped: Mapping[str, str] | None = None,
) -> bytes:
    """The page as UTF-8. The same facts give the same bytes.

    Args:
        manifest: from `export.manifest.describe`.
        parity: what parity.json holds.
        files: name -> `bytes` and `sha256` of each other file of the bundle.
        graph: from `export.fusion.description.describe_graph`.
        command: that made the bundle; empty where it was made from Python.
        skipped: flavour of an engine -> why it was not built.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = ("number", "percent", "short", "size")
    environment.filters.update({name: getattr(numbers, name) for name in forms})
    drawn = boxes(graph)
    page = environment.get_template(_TEMPLATE).render(
        manifest=manifest,
        parity=parity,
        files=dict(sorted(files.items())),
        engines=dict(sorted(manifest["engines"].items())),
        versions=dict(sorted(manifest["versions"].items())),
        command=command,
        skipped=dict(sorted((skipped or {}).items())),
        name=str(manifest["model"].get("name") or "network without a name"),
        untrained=_untrained(manifest["model"]),
        weights=_weights(manifest["model"]),
        pictures=_pictures(manifest["model"]),
        classes=_classes(manifest["model"]),
        classes_shown=_CLASSES_SHOWN,
        mark_of=_mark(parity),
        rungs=[_rung(rung, files) for rung in parity["rungs"]],
        operators=_operator_sections(parity["rungs"]),
        costs=_costs(parity["quantisation"]),
        boxes=drawn,
        lanes=max((lane.index + 1 for box in drawn for lane in box.lanes), default=0),
        most_lanes=LANES,
        kinds=Counter(node["kind"] for node in graph["nodes"] if node["role"] == "fused").most_common(),
        left=[node for node in graph["nodes"] if node["role"] == "left"],
        replaced=sum(len(node["parts"]) for node in graph["nodes"]),
        retained=RETAINED_PERCENT,
    )
    return page.lstrip().encode(errors="backslashreplace")  # a file name may hold bytes that are no text


def _untrained(model: Mapping[str, Any]) -> bool:
    return model.get("trained") is False


def _weights(model: Mapping[str, Any]) -> dict[str, str]:
    """`file` and `sha256` of the weights, or only `file`, in words."""
    weights = model.get("weights")
    if isinstance(weights, Mapping):
        return {key: str(weights[key]) for key in ("file", "sha256") if key in weights}
    return {"file": str(weights)} if weights else {}


def _pictures(model: Mapping[str, Any]) -> str:
    """How they become inputs, each step by its name; empty where nobody said."""
    record = model.get("preprocessing")
    steps = record.items() if isinstance(record, Mapping) else ()
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in steps
    )


def _classes(model: Mapping[str, Any]) -> list[str]:
    classes = model.get("classes")
    return [str(name) for name in classes] if isinstance(classes, Sequence) and not isinstance(classes, str) else []


def _mark(parity: Mapping[str, Any]) -> str:
    """What stands before a verdict: of a form, or of the whole export."""
    return {EQUAL: "passed", EMULATED: "passed", NO_VERDICT: "open", WRONG: "failed"}.get(parity["status"], "absent")


def _rung(rung: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A rung with how many of its operators passed, how large its file is and what became of it."""
    operators, verdict = rung.get("operators"), rung["verdict"]
    if verdict == EQUAL and rung.get("decision") == NO_VERDICT:
        verdict = f"{EQUAL}, {NO_VERDICT} on top-1"
    return {
        **rung,
        "shown": "" if operators is None else f"{_passed(operators['checked'])}/{len(operators['checked'])}",
        "bytes": files[rung["file"]]["bytes"] if rung["file"] in files else None,
        "mark": _mark(rung),
        "verdict": verdict,
    }


def _passed(checks: Sequence[Mapping[str, Any]]) -> int:
    return sum(not check["reason"] for check in checks)


def _operator_sections(rungs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each form that shows its operators: its plots, and a summary of the checks that are not plotted."""
    shown = [rung for rung in rungs if "operators" in rung]
    drawn: list[list[Plot]] = [[] for _ in shown]
    for measure, wanted in ((Z, None), (LAYERS, "layer"), (VALUES, "quantize_linear")):
        chosen = [_chosen(rung["operators"]["checked"], wanted) for rung in shown]
        for own, plot in zip(drawn, plots(measure, chosen), strict=True):
            own += [plot] if plot.rows else []
    return [
        {
            "name": rung["name"],
            "runtime": rung["runtime"],
            "precision": rung["precision"],
            "plots": own,
            "others": _others(rung["operators"]["checked"]),
            "unchecked": rung["operators"]["unchecked"],
        }
        for rung, own in zip(shown, drawn, strict=True)
    ]


def _chosen(checks: Sequence[Mapping[str, Any]], kind: str | None) -> list[Mapping[str, Any]]:
    """The checks of 8 bits of one kind; without a kind, those of floating point."""
    return [check for check in checks if (check["kind"] == kind if "lsb" in check else kind is None)]


def _others(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The checks of 8 bits that are not plotted, by what they are of."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for check in checks:
        if "lsb" in check and check["kind"] not in ("layer", "quantize_linear"):
            groups.setdefault(_KINDS.get(check["kind"], _OUTPUTS), []).append(check)
    found = []
    for (what, unit), members in groups.items():
        errors = [check["lsb"] for check in members]
        worst = max(errors) if all(map(numbers.is_finite, errors)) else None
        limits = [check["lsb_limit"] for check in members if check.get("lsb_limit") is not None]
        found.append(
            {
                "what": what,
                "unit": unit,
                "passed": f"{_passed(members)}/{len(members)}",
                "worst": worst,
                "limit": max(limits, default=None),
            }
        )
    return found


def _costs(quantisation: Mapping[str, Any] | None) -> Plot | None:
    if quantisation is None or not quantisation["costs"]:
        return None
    costs = sorted(quantisation["costs"].items(), key=lambda cost: (-cost[1], cost[0]))
    (plot,) = plots(COSTS, [[{"name": name, "error": error} for name, error in costs]])
    return plot
