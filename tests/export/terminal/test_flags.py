"""What the library names, fields and arguments, is what a person at a terminal types; and it names nothing else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

from export import ExportConfig, export_bundle
from export.runtime.artefacts import artefacts
from export.runtime.engines.options import EngineConfig
from export.terminal.flags import FLAGS, in_flags
from resnet.data.presets import Changes, open_preset
from resnet.models import create_model
from resnet.training.loop import train
from resnet.training.settings import TrainingConfig
from resnet.weights import load_weights
from tests.faults.command_inputs import actions_of
from tests.scripts.loading import load_script

ROOT = Path(__file__).resolve().parents[3]
NAMED = {
    named.__name__: named
    for named in (
        *(ExportConfig, EngineConfig, TrainingConfig, Changes, artefacts, export_bundle, create_model, load_weights),
        open_preset,
        train,
    )
}
TAKES = {"TrainingConfig": "train", "train": "train", "artefacts": "verify"}  # the script, where it is not export

MESSAGES = {
    "ExportConfig.keep_fp32='auto' finds the layers": "--keep-fp32 auto finds the layers",
    "ExportConfig.keep_fp32=('layer2.1.conv1',) leaves": "--keep-fp32 layer2.1.conv1 leaves",
    "is for ExportConfig.precision='int8', got ExportConfig.precision='fp16'": "is for --int8, got --fp16",
    "lower EngineConfig.workspace_mib, ExportConfig.batch or EngineConfig.optimization_level, or": (
        "lower --workspace, --batch or --optimization-level, or"
    ),
    "normalised; ExportConfig.input='uint8' is for": "normalised; --input uint8 is for",
    "EngineConfig.dla_core=2: this device has": "--dla 2: this device has",
    "ExportConfig.batch=8, got ExportConfig.batch=1:8:32": "--batch 8, got --batch 1:8:32",
    "give export_bundle(calibration=...)": "give --calibration DIR",
    "give export_bundle(labelled=...)": "give --data",
    "go on by train(resume=True), or": "go on by --resume, or",
    "try create_model(num_classes=7); try create_model(in_channels=1)": "try --num-classes 7; try --in-channels 1",
    "create_model(name='a (b)'): x": "--model a (b): x",
    "again: build_on_device('/a b/c')": "again: python scripts/verify.py /a b/c --build",
    "here: build_on_device(BUNDLE)": "here: python scripts/verify.py BUNDLE --build",
    "nn.Conv2d(bias=True), x.y=3, ExportConfig.nothing='x', train(epochs=3)": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message: str) -> None:
    expected = MESSAGES[message] or message
    assert in_flags(message) == expected
    assert json.loads(in_flags(json.dumps({"reason": message}))) == {"reason": expected}


@pytest.mark.parametrize("name", FLAGS)
def test_the_table_names_what_there_is(name: str) -> None:
    owner, argument = re.split(r"[.(]", name.rstrip(")"))
    named = NAMED[owner]
    fields = {field.name for field in dataclasses.fields(named)} if dataclasses.is_dataclass(named) else ()
    assert argument in (fields or inspect.signature(named).parameters)
    actions = actions_of(load_script(TAKES.get(owner, "export")))
    assert FLAGS[name].partition(" ")[0] in {flag for action in actions for flag in action.option_strings}


def test_every_setting_has_a_flag() -> None:
    for owner in (ExportConfig, EngineConfig, TrainingConfig, Changes):
        names = {f"{owner.__name__}.{field.name}" for field in dataclasses.fields(owner)}
        assert names - FLAGS.keys() <= {"ExportConfig.engine_config"}


# Programs that the library calls or names, with flags of their own.
OTHERS = ("nvidia-smi", "docker", "tritonserver", "sys.executable")


def first_word(command: ast.List) -> object:
    first = command.elts[0]
    if isinstance(first, ast.Starred):
        first = getattr(first.value, "elts", [first])[0]
    return ast.unparse(first).strip("'")


def test_the_library_names_no_flag_and_no_script() -> None:
    sources = [path for room in ("export", "resnet") for path in (ROOT / room).rglob("*.py")]
    for path in sources:
        if (ROOT / "export" / "terminal") in path.parents:
            continue
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        commands = [n for n in nodes if isinstance(n, ast.List) and n.elts and first_word(n) in OTHERS]
        of_others = {node for command in commands for node in ast.walk(command)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in of_others:
                assert not re.search(r"(?<![\w-])--[a-z]|python scripts/", node.value), f"{path}: {node.value!r}"
