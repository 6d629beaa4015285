"""From what messages of the library name, fields and arguments, to the flags and commands of a terminal."""

from __future__ import annotations

import re

from export.terminal.commands import typed

# A field of a dataclass, or an argument of a function -> the flag, and what stands for its value where none is given.
FLAGS = {
    "ExportConfig.precision": "--precision",
    "ExportConfig.batch": "--batch",
    "ExportConfig.engine": "--engine",
    "ExportConfig.calibration_method": "--calibration-method",
    "ExportConfig.kernels": "--kernels",
    "ExportConfig.keep_fp16": "--keep-fp16",
    "ExportConfig.layer_costs": "--layer-costs",
    "ExportConfig.keep_fp32": "--keep-fp32",
    "ExportConfig.outputs": "--outputs",
    "ExportConfig.input": "--input",
    "ExportConfig.features": "--features",
    "ExportConfig.unverified": "--unverified",
    "ExportConfig.quick": "--quick",
    "EngineConfig.workspace_mib": "--workspace",
    "EngineConfig.optimization_level": "--optimization-level",
    "EngineConfig.timing_cache": "--timing-cache",
    "EngineConfig.version_compatible": "--version-compatible",
    "EngineConfig.hardware_compatible": "--hardware-compatible",
    "EngineConfig.targets": "--targets",
    "EngineConfig.dla_core": "--dla",
    "TrainingConfig.epochs": "--epochs",
    "TrainingConfig.batch_size": "--batch-size",
    "TrainingConfig.optimizer": "--optimizer",
    "TrainingConfig.learning_rate": "--learning-rate",
    "TrainingConfig.warmup_epochs": "--warmup-epochs",
    "TrainingConfig.label_smoothing": "--label-smoothing",
    "TrainingConfig.l2": "--l2",
    "TrainingConfig.l1": "--l1",
    "TrainingConfig.dropout": "--dropout",
    "TrainingConfig.augment": "--augment",
    "TrainingConfig.clip": "--clip",
    "TrainingConfig.patience": "--patience",
    "TrainingConfig.seed": "--seed",
    "artefacts(runtime)": "--runtime",
    "export_bundle(images)": "--images",
    "export_bundle(labelled)": "--data",
    "export_bundle(calibration)": "--calibration DIR",
    "Changes.mean": "--mean",
    "Changes.std": "--std",
    "Changes.resize": "--resize",
    "Changes.crop": "--crop",
    "Changes.interpolation": "--interpolation",
    "export_bundle(preprocessing)": "--preprocessing",
    "open_preset(name)": "--preprocessing",
    "create_model(name)": "--model",
    "create_model(num_classes)": "--num-classes",
    "create_model(in_channels)": "--in-channels",
    "load_weights(path)": "--weights PATH",
    "load_weights(key)": "--weights-key",
    "train(resume)": "--resume",
}
_WITHOUT_VALUE = ("", "...", "True")
_TEXT = r"'[^'\"\\]*'"
_FIELD = re.compile(rf"\b([A-Z]\w+\.\w+)(?:=({_TEXT}|\({_TEXT},\)|[^\s,;:'\"()]+(?::\d+)*))?")
_ARGUMENT = re.compile(rf"\b(\w+)\((\w+)=({_TEXT}|[^'\"()]*)\)")
_BUILD = re.compile(r"\bbuild_on_device\('?([^'\"()]*)'?\)")


def in_flags(message: str) -> str:
    """A message with `ExportConfig.batch=8` as `--batch 8`, `train(resume=True)` as `--resume`, and so on.

    What is in no table stays as it is. In the text of a JSON object too.
    """
    message = _BUILD.sub(lambda found: f"{typed('verify')} {found[1]} --build", message)
    message = _ARGUMENT.sub(lambda found: _flag(f"{found[1]}({found[2]})", found[3]) or found[0], message)
    return _FIELD.sub(lambda found: _flag(found[1], found[2] or "") or found[0], message)


def _flag(name: str, value: str) -> str | None:
    """The flag with its value; None for what has none."""
    flag = FLAGS.get(name)
    if flag is None or value in _WITHOUT_VALUE:
        return flag
    value = value.strip("(,)").strip("'")
    return f"--{value}" if flag == "--precision" else f"{flag} {value}"
