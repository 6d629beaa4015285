"""report.html: what is on it, that it needs nothing outside it, and that no name can break it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from export.report.page import render
from tests.export.report.html_tree import Element, cells, parse
from tests.export.report.report_facts import check, facts, node, quantised_check, rung

ATTACK = "</title></style><script>alert(1)</script><img src=http://x.test/ onerror=\"a('b')\">{{ 7 * 7 }}&amp;"


def page_of(arguments: dict[str, Any]) -> Element:
    return parse(render(**arguments))


def terms(page: Element) -> dict[str, str]:
    return {row.one("dt").words: row.one("dd").words for row in page.one("dl").all("div")}


def test_heading_says_what_was_exported() -> None:
    page = page_of(facts())
    assert page.one("h1").words == "mine in fp16" and not page.all(id="untrained")
    assert page.one("head").one("title").words == "mine in fp16: equal to the eager model"
    assert page.one(id="verdict").words == "✓ equal to the eager model"
    assert terms(page) == {
        "weights": f"mine.safetensors sha256 {'ab' * 32}",
        "input": "input: batch \u00d7 3 \u00d7 32 \u00d7 32 float32",
        "output": "output: batch \u00d7 2 float32",
        "batch": "1 to 32, best at 8",
        "ONNX opset": "18",
        "kept in float32": "block.conv2",
        "classes": "2: cat, dog",
        "versions": "python 3.11.7, torch 2.13.0",
    }
    sections = [section.attrib.get("id") for section in page.all("section")]
    assert [name for name in sections if name] == ["forms", "operators", "graph", "files", "again"]


def test_other_models() -> None:
    """Untrained weights are said loudly, many classes fold away, and what nobody described is not made up."""
    arguments = facts()
    model = arguments["manifest"]["model"]
    model.update(trained=False, weights="UNTRAINED: seed 0", classes=[f"class {i}" for i in range(1000)])
    page = page_of(arguments)
    assert page.one(id="untrained").one("strong").words == "UNTRAINED weights"
    assert "UNTRAINED" in page.one("head").one("title").words
    details = page.one("details")
    assert details.one("summary").words.startswith("1000: class 0, ") and details.one("summary").words.endswith("…")
    assert details.words.endswith("class 999")
    arguments["manifest"].update(model={}, batch={"min": 4, "opt": 4, "max": 4})
    page = page_of(arguments)
    assert page.one("h1").words == "network without a name in fp16"
    assert terms(page)["weights"] == "not stated" and terms(page)["batch"] == "always 4"
    assert "classes" not in terms(page)


def test_every_form_is_in_the_table() -> None:
    heading, eager, fused, onnx, engine = cells(page_of(facts()).one("table", within="rungs"))
    assert heading == [
        "form", "runtime", "precision", "operators passed", "error", "eager error", "ratio", "limit", "top-1", "size",
        "ms/image", "verdict",
    ]  # fmt: skip
    measured = ["5.00e-04", "6.00e-04", "0.83", "1.5", "100 %"]
    assert eager == ["✓ eager", "torch 2.13", "fp16", "", *measured, "", "3578", "equal"]
    assert fused == ["✓ fused", "torch 2.13", "fp16", "2/2", *measured, "", "12.3", "equal"]
    assert onnx[-3:] == ["51.1 MB", "12.3", "equal, no verdict on top-1"]
    heads = page_of(facts()).one("table", within="rungs").one("tbody").all("th")
    assert [head.attrib["data-verdict"] for head in heads] == [row[-1] for row in (eager, fused, onnx, engine)]
    not_run = "not run: no NVIDIA GPU here"
    assert engine == ["\u2013 tensorrt-rtx", "tensorrt-rtx", "fp16", *[""] * 6, "1.2 MB", "", not_run]


def test_a_failure_is_seen_everywhere() -> None:
    arguments = facts()
    parity = arguments["parity"]
    parity.update(passed=False, status="wrong", verdict="not equal to the eager model: fused: conv1")
    wrong = {"passed": False, "status": "wrong", "verdict": "conv1: NaN"}
    parity["rungs"][1].update(wrong, error=None, ratio=math.inf, top1_agreement=None)
    parity["rungs"][1]["operators"]["checked"][0] = check("conv1", None, math.nan, "3 values are NaN")
    page = page_of(arguments)
    assert page.one(id="verdict").words.startswith("✗ not equal")
    fused = cells(page.one("table", within="rungs"))[2]
    assert (
        fused[0] == "✗ fused" and fused[3:9] == ["1/2", "∞", "6.00e-04", "∞", "1.5", ""] and fused[-1] == "conv1: NaN"
    )
    plot = page.all("table", within="plot")[0]
    row = plot.one("tr", within="bad")
    assert [use.attrib["href"] for use in row.all("use")] == ["#beyond", "#beyond"]
    assert [cell.words for cell in row.all("td", within="n")] == ["∞", "∞"]
    assert plot.one("td", within="why").words == "✗ conv1: 3 values are NaN"


def test_evidence_is_told_and_gives_no_verdict_where_it_is_weak() -> None:
    arguments = facts()
    arguments["parity"]["evidence"]["unexercised"] = ["gate.relu: the ReLU clips no value"]
    text = page_of(arguments).one(id="forms").words
    told = ("25 % to 75 %", "at least 512 times", "scores (labelled pictures are given)", "875 times", "9 classes")
    assert all(words in text for words in (*told, "Not seen on any image: gate.relu: the ReLU clips no value"))
    arguments["parity"].update(passed=False, status="no verdict", verdict="no verdict, the evidence is too weak: dead")
    nothing: dict[str, Any] = {"active_share": None, "summand_signal": None, "outputs": {}, "unexercised": []}
    arguments["parity"]["evidence"] = {"weaknesses": ["dead"], **nothing}
    page = page_of(arguments)
    assert page.one(id="verdict").words == "? no verdict, the evidence is too weak: dead"
    assert "UNVERIFIED" in page.one(id="unverified").words
    assert page.one(id="evidence").words == "" and "Weak evidence: dead" in page.one(id="forms").words


def positions(row: Element) -> tuple[list[float], list[float]]:
    """Of the points and of the limits of a row of a plot."""
    points = [float(point.attrib["x"].removesuffix("%")) for point in row.all("svg", within="point")]
    limits = [float(line.attrib["x1"].removesuffix("%")) for line in row.all("line", within="limit")]
    return points, limits


def test_plot_has_a_row_for_each_operator_in_order() -> None:
    page = page_of(facts())
    fused, onnx = page.all("table", within="plot")
    assert cells(fused) == cells(onnx) and [row[0] for row in cells(fused)] == ["operator", "conv1", "block.conv2"]
    assert [row[2:] for row in cells(fused)] == [["rms z", "max z"], ["1.00", "4.00"], ["1.20", "3.00"]]
    row = fused.one("tbody").all("tr")[1]
    assert row.one("title").words == "block.conv2; conv2d_bias_act; rms z 1.20, limit 1.60; max z 3.00, limit 9.00"
    (rms, peak), (rms_limit, max_limit) = positions(row)
    assert rms < rms_limit < peak < max_limit
    assert {"1.6", "9"} <= {text.words for text in fused.one("thead").all("text")}
    assert "Without a criterion: norm" in page.one(id="operators").words


def test_checks_of_8_bits_are_plotted_by_what_they_are_of() -> None:
    arguments = facts()
    checked = [
        quantised_check("conv1.quantized", "scale", 0.25, 0.5),
        quantised_check("conv1.weight", "weight", 0.5, 0.5, 1.0),
        quantised_check("fc.weight", "weight", 0.125, 0.5, 1.0),
        quantised_check("conv1", "layer", 3.0, 9.0),
        quantised_check("conv1.quantized", "quantize_linear", 1.0, 1.0, 0.004),
        quantised_check("fc", "linear", None, 4.0, 1.0),
        quantised_check("box", "linear", 0.5, 4.0, 1.0),
    ]
    arguments["parity"]["rungs"][1:3] = [rung("onnx", operators={"checked": checked, "unchecked": []})]
    calibration = {"method": "percentile", "images": 512, "sha256": "12" * 32}
    quantisation = {"calibration": calibration, "layers": 2, "kept": ["fc"], "float_convolutions": 0}
    quantisation |= {"costs": {"conv1": 0.002, "fc": 0.007}, "purposes": {"model.onnx": "TensorRT"}}
    arguments["parity"]["quantisation"] = quantisation
    page = page_of(arguments)
    layers, values, costs = page.all("table", within="plot")
    assert cells(layers)[1] == ["conv1", "conv1; layer; max z 3.00, limit 9.00", "3.00"]
    (point,), (limit,) = positions(layers.one("tbody").one("tr"))
    assert point < limit
    assert cells(values)[1] == ["conv1", "conv1.quantized; quantize_linear; differing 0.4 %, limit 5 %", "0.4 %", "1"]
    assert [row[0] for row in cells(costs)[1:]] == ["fc", "conv1"]
    others = cells(page.one(id="operators").one("table", within="small"))
    assert [row[1:] for row in others[1:]] == [["1/1", "0.25", "0.5"], ["2/2", "0.5", "0.5"], ["2/2", "∞", "4"]]
    text = page.one(id="operators").words
    assert "kept in floating point: fc" in text and "512 images (percentile)" in text
    assert "model.onnxTensorRT" in page.one(id="files").words
    assert "within 1 LSB" in page.one(id="meaning").words and "at least 99 %" in page.one(id="meaning").words


def test_boxes_say_what_they_replaced_and_what_they_read() -> None:
    graph = page_of(facts()).one(id="graph")
    x, conv1, norm, conv2, scores, mask = graph.all("article", within="box")
    assert "2 fused operators do the work of 6" in graph.one(id="coverage").words
    assert "1 is left as it was" in graph.one(id="coverage").words
    assert conv1.one("p", within="parts").words == "conv1 + bn1 + relu" and not conv1.all("p", within="reads")
    assert conv2.one("p", within="parts").words == "in block: conv2 + forward() + relu"
    assert [part.attrib["title"] for part in conv2.all("span", within="name") if "title" in part.attrib] == [
        "block.conv2", "block", "block.relu"
    ]  # fmt: skip
    assert conv2.one("p", within="reads").words == "residual of conv1"
    assert conv2.one("p", within="kept").words == "computes in float32" and not conv1.all("p", within="kept")
    assert "left" in norm.classes and norm.one("p", within="reason").words == "left eager: its groups"
    assert x.words.startswith("input x") and scores.words.startswith("output scores")
    assert mask.one("p", within="reads").words == "reads norm"
    drawn = [[lane.classes[1:] for lane in item.all("span", within="lane")] for item in graph.one("ol").all("li")]
    assert drawn[1] == [["starts", "residual"]] and ["ends", "residual"] in drawn[3] and drawn[5] == [["ends"]]
    trunks = [len(item.all("span", within="trunk")) for item in graph.one("ol").all("li")]
    assert trunks == [1, 2, 2, 2, 1, 0]


def test_a_graph_with_more_values_than_lines() -> None:
    arguments = facts()
    assert "Lines are drawn for" not in page_of(arguments).one(id="graph").words
    arguments["graph"]["nodes"] = [node("left", str(i)) for i in range(20)]
    arguments["graph"]["edges"] = [{"from": i, "to": 19, "role": ""} for i in range(12)]
    assert "Lines are drawn for 8 values at a time" in page_of(arguments).one(id="graph").words


def test_files_accuracy_and_engines() -> None:
    page = page_of(facts())
    files = cells(page.one(id="files").all("table")[0])
    assert files[1:] == [
        ["model.onnx", "51.1 MB", "ef" * 32], ["model.rtx.engine", "1.2 MB", "01" * 32],
        ["parity.json", "999 bytes", "cd" * 32],
    ]  # fmt: skip
    assert [row[3:] for row in cells(page.one(id="accuracy"))[1:]] == [
        ["95.00 %", "", "190", "200"], ["94.50 %", "-0.50 pp", "189", "200"]
    ]  # fmt: skip
    assert cells(page.one(id="engines"))[1] == [
        "model.rtx.engine", "tensorrt-rtx", "1.7", "3", "0.35 s", "targets sm_80 sm_89, workspace_mib 64"
    ]  # fmt: skip
    assert "tensorrt engine not built: tensorrt is not installed" in page.one(id="forms").words


def test_commands_accuracy_engines_and_operators_or_that_there_are_none() -> None:
    again = page_of(facts()).one(id="again")
    assert [code.words for code in again.all("code")] == [facts()["command"], "resnet-deploy verify FOLDER"]
    assert again.one(id="meaning").words.count(".") == 2
    arguments = facts() | {"command": "", "skipped": None}
    arguments["manifest"]["engines"], arguments["parity"]["accuracy"] = {}, []
    arguments["parity"]["rungs"] = [rung("eager")]
    page = page_of(arguments)
    assert (
        page.one(id="accuracy").words.startswith("Not measured") and page.one(id="engines").words == "None was built."
    )
    assert not page.all(id="command") and "No form of this network" in page.one(id="operators").words
    assert [code.words for code in page.one(id="again").all("code")] == ["resnet-deploy verify FOLDER"]


def attacked(value: Any) -> Any:
    """Every text that a name can come from, replaced; what the page branches on is kept."""
    kept = ("role", "decision", "trained", "sha256")
    if isinstance(value, dict):
        renamed = {"engines", "versions", "files", "skipped"}
        result = {key: item if key in kept else attacked(item) for key, item in value.items()}
        for key in renamed & result.keys():
            result[key] = {f"{ATTACK}{name}": item for name, item in (result[key] or {}).items()}
        return result
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_names_are_text_wherever_they_come_from() -> None:
    tree = page_of(attacked(facts()))
    assert not tree.all("script") and not tree.all("img") and len(tree.all("style")) == 1
    places = ("title", "h1", "dl", "table", "h3", "code")
    assert all(any(ATTACK in e.words for e in tree.all(tag)) for tag in places)
    titles = [e.attrib["title"] for e in tree.all() if "title" in e.attrib]
    assert titles and all(title == ATTACK for title in titles)
    assert ATTACK in tree.one(id="graph").one("ol").words and ATTACK in tree.one(id="engines").words
    arguments = facts()
    arguments["manifest"]["model"]["weights"]["file"] = "caf\udce9.pt"  # no text at all
    assert "caf\\udce9.pt" in page_of(arguments).one("dl").words


def test_nothing_outside_the_page() -> None:
    page = render(**facts())
    tree = parse(page)
    ids = [e.attrib["id"] for e in tree.all() if "id" in e.attrib]
    assert len(set(ids)) == len(ids)
    assert {e.attrib["href"][1:] for e in tree.all() if "href" in e.attrib} <= set(ids)
    assert tree.attrib["lang"] == "en" and len(tree.all("h1")) == 1
    for element in tree.all():
        assert not {"src", "srcset", "data", "action", "poster"} & element.attrib.keys()
        assert not any(name.startswith("on") for name in element.attrib)
        assert element.attrib.get("href", "#").startswith("#")
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
    style = tree.one("style").words + " ".join(e.attrib.get("style", "") for e in tree.all())
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert page.startswith(b"<!DOCTYPE html>") and page.count(b"http") == 1  # of http-equiv
    policy = tree.one("meta", **{"http-equiv": "Content-Security-Policy"}).attrib["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def test_same_facts_give_the_same_bytes() -> None:
    expected = render(**facts())
    assert render(**reversed_keys(facts())) == expected
    code = (
        "import sys; from export.report.page import render; from tests.export.report.report_facts import facts; "
        "sys.stdout.buffer.write(render(**facts()))"
    )
    for seed in ("1", "2"):
        command, root = [sys.executable, "-c", code], Path(__file__).parents[3]
        done = subprocess.run(command, cwd=root, env={"PYTHONHASHSEED": seed}, capture_output=True, check=False)
        assert done.stdout == expected, done.stderr.decode()
