"""What is in a bundle: its manifest and its files, all checked before any is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.base.batch import FLOAT32, UINT8, Batch
from export.base.errors import ExportError
from export.base.normalisation import CHANNELS
from export.base.precision import FORMATS, Precision
from export.runtime.bundle.folder import FORMAT, read_verified
from export.runtime.engines.engine import FLAVOURS, Engine
from export.runtime.engines.options import EngineConfig
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.parity.accuracy import class_count, class_names
from export.runtime.parity.network import EITHER, SCORES, VALUES, OutputKind


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file is the one that was written, and what its manifest says.

    Attributes:
        path: its folder.
        manifest: the whole of it.
        contents: file name -> the bytes that were checked.
        precision: of weights and activations.
        batch: the batch sizes its artefacts accept.
        inputs: name -> shape without the batch, in order.
        dtype: of all inputs: FLOAT32, or UINT8 for pictures as bytes [N, H, W, C], which its files normalise.
        outputs: name -> shape, in order.
        kinds: name of an output -> what it is, of those of which the manifest says it.
        engines: those it lists.
        kept: the layers that compute in a wider type than the precision, by the names of their ONNX nodes.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)
    contents: Mapping[str, bytes] = field(repr=False)
    precision: Precision
    batch: Batch
    inputs: Mapping[str, tuple[int, ...]]
    dtype: str
    outputs: Mapping[str, tuple[int | str, ...]]
    kinds: Mapping[str, OutputKind] = field(repr=False)
    engines: tuple[Engine, ...] = field(repr=False)
    kept: frozenset[str] = field(repr=False)

    @property
    def onnx_sha256(self) -> str:
        """Of the file that engines are built from."""
        return str(self.manifest["files"][ONNX_FILE]["sha256"])

    @property
    def unverified(self) -> str:
        """Why no verdict was reached when it was exported; empty where it was found to be equal."""
        return "" if self.manifest.get("verified", True) is True else str(self.manifest.get("verdict", "not stated"))

    @property
    def class_count(self) -> int:
        """How many classes there are; raises ExportError where the first output is not [N, classes]."""
        first, shape = next(iter(self.outputs.items()))
        kind = self.kinds.get(first, OutputKind())
        if kind.kind == VALUES:
            raise ExportError(f"{self.path}: expected class scores, {first} holds values ({kind.why})")
        return class_count(shape)

    @property
    def probabilities(self) -> bool:
        """Whether the first output is probabilities and not what a softmax would make some of."""
        return self.kinds.get(next(iter(self.outputs)), OutputKind()).softmax

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, None where the manifest has none; raises ExportError where they do not fit."""
        names = self.manifest["model"].get("classes")
        return None if names is None else class_names(names, self.class_count)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of its one input, or (H, W, C) of bytes; raises ExportError where it takes several."""
        if len(self.inputs) > 1:
            given = " and ".join(f"{name} [N, {', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
            raise ExportError(f"{self.path} takes {given}: expected a bundle with one input, a picture")
        (shape,) = self.inputs.values()
        return shape

    @property
    def preprocessing(self) -> Mapping[str, Any] | None:
        """How a picture becomes an input; None where the manifest does not say.

        Raises:
            ExportError: it says something else; the model does not take one picture of 1 or 3 channels.
        """
        record, shape = self.manifest["model"].get("preprocessing"), self.image_shape
        channels = shape[-1] if self.dtype == UINT8 else shape[0]
        if channels not in CHANNELS or not (record is None or isinstance(record, Mapping)):
            raise ExportError(f"{self.path} takes inputs of shape {list(shape)}: expected those of pictures, "
                              f"and a preprocessing in its manifest, got {record!r:.80}")  # fmt: skip
        return record

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raises ExportError where a picture's inputs have another shape than `image_shape`."""
        if shape != self.image_shape:
            raise ExportError(f"{self.path} takes inputs of shape {list(self.image_shape)}: its preprocessing makes "
                              f"{list(shape)}")  # fmt: skip


def open_bundle(path: str | Path) -> Bundle:
    """Check every file of a bundle and read its manifest. Nothing of it is loaded or run.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file.
    """
    path = Path(path)
    manifest, contents = read_verified(path)
    if manifest.get("format") != FORMAT:
        raise ExportError(
            f"{path} has format {manifest.get('format')!r:.20}: this version reads format {FORMAT}; export it again"
        )
    try:
        precision = FORMATS[manifest["precision"]]
        batch = manifest["batch"]
        outputs = {str(output["name"]): tuple(output["shape"]) for output in manifest["outputs"]}
        if not outputs or not isinstance(manifest["model"], dict) or ONNX_FILE not in contents:
            raise ValueError(f"expected outputs, a model and {ONNX_FILE}")
        return Bundle(
            path=path,
            manifest=manifest,
            contents=contents,
            precision=precision,
            batch=Batch(minimum=_whole(batch["min"]), optimum=_whole(batch["opt"]), maximum=_whole(batch["max"])),
            inputs=_inputs(manifest["inputs"]),
            dtype=_dtype(manifest["inputs"]),
            outputs=outputs,
            kinds={str(output["name"]): _kind(output) for output in manifest["outputs"] if "kind" in output},
            engines=tuple(_engine(name, facts, contents, precision) for name, facts in manifest["engines"].items()),
            kept=frozenset(map(str, manifest["kept"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{path}: not a bundle of this project ({type(error).__name__}: {error})") from error


def _inputs(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape without the batch: of a picture, or of several tensors of any rank."""
    found = {str(entry["name"]): tuple(map(_whole, entry["shape"][1:])) for entry in entries}
    ranks = [len(shape) for shape in found.values()]
    if not found or len(found) != len(entries) or min(ranks) < 1 or (len(found) == 1 and ranks != [3]):
        raise ValueError(f"expected [N, C, H, W], or several inputs [N, ...] of different names, got {entries!r:.80}")
    return found


def _dtype(entries: Sequence[Mapping[str, Any]]) -> str:
    """Of all inputs."""
    types = {str(entry["dtype"]) for entry in entries}
    if types not in ({FLOAT32}, {UINT8}):
        raise ValueError(f"expected inputs of type {FLOAT32} or {UINT8}, got {', '.join(sorted(types)):.80}")
    return types.pop()


def _kind(output: Mapping[str, Any]) -> OutputKind:
    kind, softmax = output["kind"], output.get("softmax", False)
    if kind not in (SCORES, VALUES, EITHER):
        raise ValueError(f"expected {SCORES}, {VALUES} or {EITHER!r} of an output, got {kind!r:.80}")
    if not isinstance(softmax, bool):
        raise TypeError(f"expected true or false of a softmax, got {softmax!r:.80}")
    return OutputKind(str(kind), str(output["why"]), softmax)


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r:.80}")
    return value


def _engine(name: str, facts: Mapping[str, Any], contents: Mapping[str, bytes], precision: Precision) -> Engine:
    """An engine from the bytes that were checked: only under the name its flavour has in a bundle."""
    flavour = FLAVOURS[facts["flavour"]]
    if flavour.file_name != name:
        raise ValueError(f"{name!r} is not the name of an engine of {flavour.name}")
    if not isinstance(facts["version"], str):
        raise TypeError(f"expected the version of an engine, got {facts['version']!r:.80}")
    return Engine(
        flavour=flavour,
        plan=contents[name],
        version=facts["version"],
        precision=precision,
        convolutions=facts["convolutions"],
        seconds=facts["build_seconds"],
        config=EngineConfig.from_json(facts.get("options", {})),
        gpu=str(facts["gpu"] or ""),
    )
