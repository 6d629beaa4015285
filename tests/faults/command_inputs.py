"""Command lines of every script: real flags and others, with values that fit and values that do not.

Nothing long is run: what would train, tune, measure, compile or compute an export ends as a refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from export.base.errors import ExportError
from export.terminal.command_line import Parser
from resnet.data import sources
from resnet.models import MODELS, create_model
from tests.faults.bundle_inputs import TryOne, a_picture, class_folders, run
from tests.scripts.loading import load_script

# Where each script's work begins.
WORK = {
    "export": ("export_bundle", "initialise", "download"),
    "train": ("train_once", "run_experiment"),
    "tune": ("tune_models", "time_as_is"),
    "gpu": ("run_in_child",),
    "benchmark": ("compare", "floors", "export_step", "tool", "quick"),
    "compile_kernels": ("fuse", "compile_for"),
    "evaluate": ("import_ray",),
    "verify": ("build_on_device",),
    "classify": (),
    "serve_config": (),
    "convert": (),
}
VALUES = (
    "", " ", "0", "-1", "1", "2", "8", "16", "1:2:4", "4:2:1", "::", "1:", "0:0:0", "16x16", "x", "16x", "-16x16",
    "99999999", "9" * 30, "9" * 5000, "1e3", "1.5", "nan", "inf", "-inf", "0x10", "1_6", "\u0661\u0666", "\xb2", "\n",
    "a\nb", "a\x00b", "\x1b[2J", "\udcff", "\u202e", "%s", "{}", "$(id)", "`id`", ";id", "../../evil", "/tmp/evil",
    "$(touch evil)", "; touch evil", "--", "-", "---", "-h=1", "=",
    "--help=1", "resnet8", "resnet9", "ResNet8", "resnet", "fp16", "fp8", "auto", "none", "tensorrt", "tensorrt-rtx",
    "cpu", "cuda", "digits", "pretrained", "sm_86", "sm_90", "sm_86 sm_89", "conv1", "compare", "depths", "crop",
    "sgd", "adam", "x" * 5000, "percentile", "entropy", "minmax",
)  # fmt: skip
# Also for what is written: inside the folder, or nowhere.
FILES = (
    "bundle", "picture.png", "data", "weights.safetensors", "weights.pt", "text", "empty", "pipe", "nowhere",
    "nowhere/x", "text/x", "empty.pt", "new.safetensors", "link", "a" * 300,
)  # fmt: skip
# By a part of the argument's name.
GOOD: dict[str, tuple[str, ...]] = {
    "image_size": ("16", "16x16", "32"), "batch": ("1", "2", "1:2:4"), "model": ("resnet8",), "bundle": ("bundle",),
    "images": ("picture.png", "data/class 0/picture.png"), "image": ("picture.png",), "data": ("data", "digits"),
    "weights": ("weights.safetensors", "weights.pt"), "checkpoint": ("weights.safetensors", "weights.pt"),
    "output": ("new.safetensors", "new", "weights.safetensors"), "calibration": ("data", "digits"),
    "num_classes": ("10",), "in_channels": ("3",), "keep": ("conv1", "layer1", "auto"), "experiment": ("regularisers",),
    "targets": ("sm_86", "sm_89"), "timing_cache": ("new.cache",), "preprocessing": ("imagenet", "digits"),
    "mean": ("0.5",), "std": ("0.25",), "resize": ("16", "20x20"), "crop": ("16",), "interpolation": ("bicubic",),
}  # fmt: skip
NEAR = ("--mdoel", "--Fp16", "--f", "--", "-x", "--no-json", "--json=1", "--batch=", "-1")


def command_lines(source: Path, folder: Path) -> TryOne:
    make_files(source, folder)
    torch.set_num_threads(1)
    sources._STATISTICS_PICTURES = 8  # each training that is prepared measures so many digits
    scripts = [(module, actions_of(module)) for module in (confined(name, names) for name, names in WORK.items())]

    def try_one(index: int) -> str:
        generator = random.Random(f"command line {index}")
        module, actions = scripts[index % len(scripts)]
        arguments = command_line(generator, actions)
        try:
            return run(module, arguments)
        except BaseException as error:
            raise AssertionError(f"{module.__name__} {arguments!r:.300}: {type(error).__name__} {error}") from error

    return try_one


def confined(name: str, work: tuple[str, ...]) -> ModuleType:
    """A script whose models are small and whose work is refused."""

    def refuse(*_: object, **__: object) -> Any:
        raise ExportError("the arguments are good, and the work is not done")

    made = once(create_model)

    def small(model: str, **arguments: Any) -> torch.nn.Module:
        return made("resnet8", **arguments) if model in MODELS else create_model(model, **arguments)

    module = load_script(name)
    names = vars(module)
    names |= dict.fromkeys(work, refuse)
    if "create_model" in names:
        names["create_model"] = small
    if "crops" in names:
        names["crops"] = once(names["crops"])
    return module


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called once for all arguments behind the first that are the same, and once for each device."""
    made: dict[str, Any] = {}

    def call(*arguments: Any, **named: Any) -> Any:
        key = f"{arguments[1:]} {named} {torch.get_default_device()}"
        if key not in made:
            made[key] = function(*arguments, **named)
        return made[key]

    return call


def actions_of(module: ModuleType) -> list[argparse.Action]:
    """The arguments that a script takes."""
    seen: list[argparse.Action] = []

    def note(self: Parser, *arguments: Any) -> Any:
        seen.extend(self._actions)
        raise SystemExit(0)

    with mock.patch.object(Parser, "parse_known_args", note), contextlib.suppress(SystemExit):
        module.parse_args([])
    return [action for action in seen if not isinstance(action, argparse._HelpAction)]


def command_line(generator: random.Random, actions: list[argparse.Action]) -> list[str]:
    arguments: list[str] = []
    chosen = [action for action in actions if not action.option_strings and generator.random() < 0.9]
    chosen += generator.sample(actions, generator.randrange(min(6, len(actions))))
    for action in chosen:
        values = values_for(generator, action)
        if not action.option_strings:
            arguments += values
            continue
        flag = generator.choice(action.option_strings)
        if generator.random() < 0.05:
            flag = flag[: generator.randrange(1, len(flag) + 1)]
        joined = bool(values) and flag.startswith("--") and generator.random() < 0.2
        arguments += [f"{flag}={values[0]}", *values[1:]] if joined else [flag, *values]
    if generator.random() < 0.15:
        arguments.insert(generator.randrange(len(arguments) + 1), generator.choice((*NEAR, *VALUES)))
    return arguments


def values_for(generator: random.Random, action: argparse.Action) -> list[str]:
    count = 1 if action.nargs is None else 0 if action.nargs == 0 else generator.choice((1, 1, 1, 2, 3))
    if generator.random() < 0.05:
        count = generator.randrange(3)
    pools = [good_values(action)] * 4
    writes = "output" in action.dest or "cache" in action.dest
    pools.append(FILES if writes else (*FILES, *VALUES))
    return [str(generator.choice(generator.choice(pools))) for _ in range(count)]


def good_values(action: argparse.Action) -> tuple[Any, ...]:
    """What the argument is for, or near that."""
    if action.choices:
        return tuple(action.choices)
    for word, values in GOOD.items():
        if word in action.dest:
            return values
    return ("0", "1", "2", "8") if action.type in (int, float) else FILES


def make_files(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder / "bundle")
    a_picture(folder / "picture.png")
    class_folders(folder / "data")
    state = create_model("resnet8").state_dict()
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    (folder / "text").write_text("not what you think")
    for name in ("empty", "empty.pt"):
        (folder / name).touch()
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
