"""How many labelled pictures the artefacts of some bundles get right, side by side."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, leave, run_script, show_log
from export.terminal.flags import in_flags
from export.terminal.picture_flags import add_preprocessing_flags, preprocessing_values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("evaluate", __doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folders written by export.py")
    parser.add_argument(
        "data", metavar="DATA", help="digits, an archive of CIFAR-10 or CIFAR-100, or a folder of class folders"
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="share the pictures among the machines of the Ray cluster in RAY_ADDRESS, or of one started here; BUNDLE "
        "and DATA must have the same absolute paths on all of them, as in a shared folder",
    )
    add_preprocessing_flags(parser, "as the bundle says; where it does not, one of these has to")
    parser.add_runtime()
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("evaluate"):
    import numpy as np
    from numpy.typing import NDArray

    import export
    from export.base.batch import UINT8, Arrays
    from export.base.errors import ExportError, MissingDependency, first_line
    from export.runtime.artefacts import Artefact, artefacts, running
    from export.runtime.bundle.contents import Bundle, open_bundle
    from export.runtime.parity.accuracy import Accuracy, class_indices, measure
    from export.terminal.console import images_bar, print_evaluation
    from resnet.data.labelled import LabelledImages, LabelledInputs
    from resnet.data.presets import Changes, Said
    from resnet.data.sources import open_test
    from resnet.errors import ResNetError


@dataclass(frozen=True)
class Subject:
    """A bundle and the data as its inputs; `indices` is the logit of each label."""

    bundle: Bundle
    labelled: LabelledInputs
    indices: NDArray

    @classmethod
    def of(cls, bundle: Bundle, data: LabelledImages, said: Said) -> Subject:
        """Raises ExportError where the data does not fit the bundle."""
        preprocessing = said.of(bundle.preprocessing, bundle.image_shape, bundle.dtype == UINT8)
        bundle.check_input(preprocessing.shape)
        try:
            indices = class_indices(data.classes, bundle.classes, bundle.class_count)
        except ExportError as error:
            raise ExportError(f"{bundle.path}: {error}") from error
        return cls(bundle, LabelledInputs(data, preprocessing), indices)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    show_log()
    return run_script("evaluate", args, evaluate, refusals=(ResNetError,))


def evaluate(args: argparse.Namespace) -> int:
    """Measure every artefact that runs here and show what each gets right; the exit code."""
    ray = import_ray() if args.ray else None
    bundles = [open_bundle(path) for path in args.bundles]
    named = [bundle.manifest["model"].get("data") for bundle in bundles]
    trained_on = {str(name) for name in named if name is not None}
    data = open_test(args.data, trained_on)
    said = Said(args.preprocessing, Changes(**preprocessing_values(args)))
    subjects = [Subject.of(bundle, data, said) for bundle in bundles]
    for opened in bundles:
        if opened.unverified:
            why = f"{opened.path} is UNVERIFIED; it was exported with {opened.unverified}"
            sys.stderr.write(f"{in_flags(why)}\n")
    measure_one = cluster_measure(ray, args.data, trained_on, said) if ray else measure_here
    measured, waiting = run(subjects, args.runtime, measure_one)
    if args.json:
        records = [{"bundle": bundle, "artefact": file, **found.to_json()} for bundle, file, found in measured]
        skipped = [{"bundle": bundle, "artefact": file, "reason": reason} for bundle, file, reason in waiting]
        print(in_flags(json.dumps({"data": args.data, "measured": records, "not_run": skipped})))
        return 0
    print_evaluation(measured)
    for bundle, file, reason in waiting:
        print(f"{Path(bundle) / file} not run: {in_flags(reason)}")
    return 0


Measure = Callable[[Subject, Artefact, Callable[[int], None]], Accuracy]
Measured = list[tuple[str, str, Accuracy]]  # bundle, artefact
Waiting = list[tuple[str, str, str]]  # bundle, artefact, reason


def run(subjects: Sequence[Subject], runtime: str, measure_one: Measure) -> tuple[Measured, Waiting]:
    """What each artefact for a runtime, empty for any, got right, and why others did not run.

    Raises:
        ExportError: none runs.
    """
    measured: Measured = []
    waiting: Waiting = []
    for subject in subjects:
        bundle = str(subject.bundle.path)
        for artefact in artefacts(subject.bundle, runtime):
            try:
                if artefact.obstacle:
                    raise ExportError(artefact.obstacle)
                with images_bar(f"{bundle}/{artefact.file}", len(subject.labelled)) as progress:
                    measured.append((bundle, artefact.file, measure_one(subject, artefact, progress)))
            except ExportError as error:
                waiting.append((bundle, artefact.file, str(error)))
    if not measured:
        reasons = [f"{Path(bundle) / file} does not run: {reason}" for bundle, file, reason in waiting]
        raise ExportError("; ".join(reasons))
    return measured, waiting


def measure_here(subject: Subject, artefact: Artefact, progress: Callable[[int], None]) -> Accuracy:
    bundle, precision = subject.bundle, subject.bundle.precision.name
    with running(bundle, artefact) as infer:
        return measure(
            artefact.form,
            artefact.runtime,
            precision,
            infer,
            subject.labelled,
            subject.indices,
            bundle.batch.maximum,
            progress,
        )


def import_ray() -> Any:
    """Raises MissingDependency where Ray Data is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency("ray", "ray", error) from error
    return ray


def cluster_measure(ray: Any, data: str, trained_on: set[str], said: Said) -> Measure:
    """`measure_here`, with the batches shared among the machines of a cluster.

    One worker per machine, which uses all its cores; for an engine, one per GPU. The batches are those of
    `measure_here`, and what is added up is whole numbers. The seconds include the start of the workers.
    """
    home = Path(str(export.__file__)).resolve().parent.parent
    modules = [str(home / room) for room in ("export", "kernels", "resnet")]
    ray.init(runtime_env={"py_modules": modules}, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    source = data if data == "digits" else str(Path(data).resolve())

    def measure_one(subject: Subject, artefact: Artefact, progress: Callable[[int], None]) -> Accuracy:
        bundle, labels = subject.bundle, subject.labelled.pictures.labels
        started, images, correct = time.perf_counter(), 0, 0
        size, gpus = bundle.batch.maximum, int(artefact.on_gpu)
        ranges = [{"start": i, "stop": min(i + size, len(labels))} for i in range(0, len(labels), size)]
        machines = sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())
        workers = min(int(ray.cluster_resources().get("GPU", 0)) if gpus else machines, len(ranges))
        if not workers:
            raise ExportError(f"expected a cluster with {'a GPU' if gpus else 'CPUs'}, got none")
        counts = ray.data.from_items(ranges).map_batches(
            Counter,
            fn_constructor_args=(
                *(bundle.path.resolve(), artefact.file, artefact.executor),
                *(source, trained_on, said, bundle.manifest, labels),
            ),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
        )
        try:
            for row in counts.iter_rows():
                if row["refusal"]:
                    raise ExportError(row["refusal"])
                images, correct = images + int(row["images"]), correct + int(row["correct"])
                progress(images)
        except ray.exceptions.RayError as error:
            raise ExportError(f"a worker failed: {str(error).splitlines()[-1]}") from error
        if images != len(labels):
            raise ExportError(f"the cluster counted {images} pictures: expected {len(labels)}")
        runtime, seconds = f"{artefact.runtime} x {workers}", time.perf_counter() - started
        return Accuracy(artefact.form, runtime, bundle.precision.name, images, correct, seconds)

    return measure_one


class Counter:
    """Opens the bundle and the data on its machine, then counts what ranges of pictures get right."""

    def __init__(
        self,
        path: Path,
        file: str,
        runtime: str,
        source: str,
        trained_on: set[str],
        said: Said,
        manifest: Mapping[str, Any],
        labels: NDArray,
    ) -> None:
        """`manifest` and `labels` are the driver's: bundle and data must be the same on all machines."""
        self._path, self._file, self._runtime = path, file, runtime
        self._source, self._trained_on, self._said = source, trained_on, said
        self._manifest, self._labels = manifest, labels
        self._opened: tuple[Subject, Callable[[NDArray], Arrays], ExitStack] | None = None

    def __call__(self, ranges: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """One row for each range; a refusal is a value: Ray retries what raises, and buries it in its own frames."""
        correct, refusal = [0] * len(ranges["start"]), ""
        try:
            correct = [self._count(int(i), int(j)) for i, j in zip(ranges["start"], ranges["stop"], strict=True)]
        except (ExportError, ResNetError, OSError, MemoryError) as error:
            refusal = f"{socket.gethostname()}: {first_line(error)}"
        refusals = np.array([refusal] * len(correct))
        return {"images": ranges["stop"] - ranges["start"], "correct": np.array(correct), "refusal": refusals}

    def _count(self, start: int, stop: int) -> int:
        self._opened = self._opened or self._open()
        subject, infer, _ = self._opened
        part = replace(subject.labelled, pictures=subject.labelled.pictures.subset(np.arange(start, stop)))
        return measure("", "", "", infer, part, subject.indices, stop - start).correct

    def _open(self) -> tuple[Subject, Callable[[NDArray], Arrays], ExitStack]:
        """What `measure` needs, and what keeps it open."""
        data = open_test(self._source, self._trained_on)
        subject, stack = Subject.of(open_bundle(self._path), data, self._said), ExitStack()
        same = {
            self._path: subject.bundle.manifest == self._manifest,
            self._source: np.array_equal(data.labels, self._labels),
        }
        for what, is_same in same.items():
            if not is_same:
                raise ExportError(f"{what} is not what it is on the driver: expected a shared folder")
        held = artefacts(subject.bundle, self._runtime)
        artefact = next((artefact for artefact in held if artefact.file == self._file), None)
        if artefact is None:  # another machine of the cluster, which built no engine of its own
            raise ExportError(f"{self._file} is not on this machine: build_on_device({str(self._path)!r})")
        return subject, stack.enter_context(running(subject.bundle, artefact)), stack


if __name__ == "__main__":
    leave(main())
