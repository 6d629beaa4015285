"""Facts of small exports, made by hand, as the manifest, parity.json and the graph hold them."""

from __future__ import annotations

import copy
from typing import Any


def check(name: str, rms: float | None = 1.0, peak: float | None = 4.0, reason: str = "") -> dict[str, Any]:
    limits = {"rms_limit": 1.6, "max_limit": 9.0}
    return {"name": name, "kind": "conv2d_bias_act", "rms_z": rms, "max_z": peak, **limits, "reason": reason}


def rung(name: str, **facts: Any) -> dict[str, Any]:
    measured = {"error": 5e-4, "eager_error": 6e-4, "ratio": 0.83, "limit": 1.5, "top1_agreement": 1.0}
    known = {"name": name, "runtime": "torch 2.13", "precision": "fp16", "file": None, "passed": True}
    return {
        **known,
        "status": "equal",
        "verdict": "equal",
        "seconds_per_image": 0.0123,
        **measured,
        "decision": "equal",
        **facts,
    }


def not_run(name: str, file: str) -> dict[str, Any]:
    told = {"passed": None, "status": "not run", "verdict": "not run: no NVIDIA GPU here", "seconds_per_image": 0.0}
    return {"name": name, "runtime": name, "precision": "fp16", "file": file, **told}


def node(role: str, name: str, kind: str = "", parts: tuple[str, ...] = (), reason: str = "") -> dict[str, Any]:
    return {"role": role, "name": name, "kind": kind, "parts": list(parts), "reason": reason, "shape": ["N", 8]}


def facts() -> dict[str, Any]:
    """The arguments of `render` for a small network of which one operator was left and one engine was not run."""
    shown = {"checked": [check("conv1"), check("block.conv2", 1.2, 3.0)], "unchecked": ["norm"]}
    weights = {"file": "mine.safetensors", "sha256": "ab" * 32}
    engine = {"flavour": "tensorrt-rtx", "version": "1.7"}
    options = {"targets": ["sm_80", "sm_89"], "workspace_mib": 64}
    scores = {"kind": "scores", "why": "labelled pictures are given", "signal": 875.0, "classes": 9}
    evidence = {"active_share": [0.25, 0.75], "summand_signal": 512.0, "outputs": {"scores": scores}, "unexercised": []}
    edges = [(0, 1, ""), (1, 2, ""), (2, 3, ""), (1, 3, "residual"), (3, 4, ""), (2, 5, "")]
    return {
        "manifest": {
            "model": {"name": "mine", "trained": True, "weights": weights, "classes": ["cat", "dog"]},
            "precision": "fp16",
            "batch": {"min": 1, "opt": 8, "max": 32},
            "inputs": [{"name": "input", "shape": ["batch", 3, 32, 32], "dtype": "float32"}],
            "outputs": [{"name": "output", "shape": ["batch", 2], "dtype": "float32"}],
            "opset": 18,
            "engines": {"model.rtx.engine": {**engine, "convolutions": 3, "build_seconds": 0.35, "options": options}},
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
        },
        "parity": {
            "passed": True,
            "status": "equal",
            "verdict": "equal to the eager model",
            "images": 16,
            "kept": ["block.conv2"],
            "quick": [],
            "evidence": {"weaknesses": [], **evidence},
            "rungs": [
                rung("eager", seconds_per_image=3.5781),
                rung("fused", operators=shown),
                rung("onnx", file="model.onnx", operators=copy.deepcopy(shown), decision="no verdict"),
                not_run("tensorrt-rtx", "model.rtx.engine"),
            ],
            "accuracy": [
                {"form": form, "runtime": "r", "precision": "p", "images": 200, "correct": c, "top1": c / 200}
                for form, c in (("eager", 190), ("fused", 189))
            ],
            "quantisation": None,
        },
        "files": {
            "parity.json": {"bytes": 999, "sha256": "cd" * 32},
            "model.onnx": {"bytes": 51_100_000, "sha256": "ef" * 32},
            "model.rtx.engine": {"bytes": 1_200_000, "sha256": "01" * 32},
        },
        "graph": {
            "nodes": [
                node("input", "x"),
                node("fused", "conv1", "conv2d_bias_act", ("conv1", "bn1", "relu")),
                node("left", "norm", "group_norm", reason="its groups"),
                node("fused", "block.conv2", "conv2d_bias_act", ("block.conv2", "block", "block.relu")),
                node("output", "scores"),
                node("output", "mask"),
            ],
            "edges": [{"from": a, "to": b, "role": role} for a, b, role in edges],
        },
        "command": "python scripts/export.py --fp16",
        "skipped": {"tensorrt": "tensorrt is not installed"},
    }


def quantised_check(name: str, kind: str, lsb: float | None, limit: float, differing: float = 0.0) -> dict[str, Any]:
    told = {"lsb": lsb, "lsb_limit": limit, "differing": differing, "differing_limit": 0.05, "reason": ""}
    return {"name": name, "kind": kind, **told}
