"""Which files of a bundle run on this machine, and running one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs, named, run_in_batches
from export.base.errors import ExportError
from export.runtime.bundle.contents import Bundle
from export.runtime.engine_store import BuiltEngine, engine_place, read_place, why_outdated
from export.runtime.engines.engine import FLAVOURS, Engine, why_not_runnable
from export.runtime.engines.kernel_engine import why_not_here
from export.runtime.engines.kernel_file import NAME
from export.runtime.engines.runner import KernelRunner, TensorRTRunner
from export.runtime.onnx_session import ONNX_FORMS, OnnxRunner, import_onnx, import_onnxruntime, runs_rounded
from export.runtime.openvino_session import OPENVINO, OpenVINORunner, openvino_file, openvino_version
from export.runtime.runner import Interface, Runner

KERNELS, ONNXRUNTIME = "kernels", "onnxruntime"
RUNTIMES = (*FLAVOURS, KERNELS, ONNXRUNTIME, OPENVINO)


@dataclass(frozen=True)
class Artefact:
    """One file that computes the network of a bundle.

    Attributes:
        form: an engine's flavour, `kernels` and the architecture, one of ONNX_FORMS, or OPENVINO.
        file: its name in the bundle; the whole path of an engine that was built on this machine.
        runtime: what executes it, with its version.
        obstacle: why this machine cannot run it, empty where nothing is known to speak against it.
        engine: of TensorRT, else None.
    """

    form: str
    file: str
    runtime: str
    obstacle: str
    engine: Engine | None = field(default=None, repr=False)

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.engine is not None or bool(NAME.fullmatch(self.file))

    @property
    def executor(self) -> str:
        """What executes it, one of RUNTIMES."""
        if self.engine is not None:
            return self.engine.flavour.name
        return KERNELS if self.on_gpu else OPENVINO if self.form == OPENVINO else ONNXRUNTIME


def artefacts(bundle: Bundle, runtime: str = "") -> list[Artefact]:
    """What this machine built from the bundle and what it holds, engines first: where one runs it is the fastest.

    Args:
        runtime: one of RUNTIMES, which alone is wanted; by default all, but OpenVINO only where it is asked for.

    Raises:
        ExportError: what was built here is not what was written; names the file. No such runtime, or nothing for it.
    """
    if runtime not in ("", *RUNTIMES):
        raise ExportError(f"artefacts(runtime={runtime!r}): expected one of {', '.join(RUNTIMES)}")
    if runtime == OPENVINO:
        return [_for_openvino(bundle)]
    found = _all_artefacts(bundle)
    wanted = [artefact for artefact in found if runtime in ("", artefact.executor)]
    if not wanted:
        held = dict.fromkeys([*(artefact.executor for artefact in found), OPENVINO])
        raise ExportError(f"{bundle.path} has nothing for {runtime}: expected one of {', '.join(held)}")
    return wanted


def _all_artefacts(bundle: Bundle) -> list[Artefact]:
    found = _built_here(bundle)
    for engine in bundle.engines:
        name, file = engine.flavour.name, engine.flavour.file_name
        found.append(Artefact(name, file, f"{name} {engine.version}", why_not_runnable(engine), engine))
    for file, content in bundle.contents.items():
        if found_name := NAME.fullmatch(file):
            target = found_name[1]
            found.append(Artefact(f"kernels {target}", file, "CUDA driver", why_not_here(content, target)))
    for file, form in ONNX_FORMS.items():
        if file in bundle.contents:
            runtime, obstacle = _onnx_obstacle(runs_rounded(bundle.precision.name, file))
            found.append(Artefact(form, file, runtime, obstacle))
    return found


def built_artefact(bundle: Bundle, built: BuiltEngine) -> Artefact:
    """An engine that this machine built, or is about to keep, as an artefact of its bundle."""
    engine, flavour = built.engine, built.engine.flavour
    obstacle = why_outdated(built, bundle.onnx_sha256)
    if obstacle:
        obstacle += f"; build it again: build_on_device({str(bundle.path)!r})"
    file = str(engine_place(bundle.path, flavour) / flavour.file_name)
    return Artefact(f"{flavour.name}, built here", file, f"{flavour.name} {engine.version}", obstacle, engine)


def _built_here(bundle: Bundle) -> list[Artefact]:
    """The engines this machine keeps for the bundle's folder, also those built from what lay there before."""
    try:
        places = [engine_place(bundle.path, flavour) for flavour in FLAVOURS.values()]
    except RuntimeError:  # a user without a home has built nothing
        return []
    return [built_artefact(bundle, built) for place in places for built in read_place(place)[:1]]


def _onnx_obstacle(rounded: bool) -> tuple[str, str]:
    """What runs an ONNX file, and why it does not."""
    runtime = "onnxruntime"
    try:
        runtime = f"onnxruntime {import_onnxruntime().__version__}"
        if rounded:
            import_onnx()
    except ExportError as error:
        return runtime, str(error)
    return runtime, ""


def _for_openvino(bundle: Bundle) -> Artefact:
    """The file that is for OpenVINO on this machine."""
    runtime, obstacle = OPENVINO, ""
    try:
        runtime = f"{OPENVINO} {openvino_version()}"
    except ExportError as error:
        obstacle = str(error)
    return Artefact(OPENVINO, openvino_file(bundle.precision), runtime, obstacle)


def artefact_runner(bundle: Bundle, artefact: Artefact) -> Runner:
    """What runs an artefact of a bundle, one batch at a time; nothing is loaded yet."""
    interface = Interface(bundle.outputs, bundle.inputs, bundle.batch, bundle.dtype)
    runner: Runner
    if artefact.engine is not None:
        runner = TensorRTRunner(artefact.engine, interface)
    elif artefact.on_gpu:
        runner = KernelRunner(bundle.contents[artefact.file], interface)
    else:
        rounded, content = runs_rounded(bundle.precision.name, artefact.file), bundle.contents[artefact.file]
        if artefact.form == OPENVINO:
            runner = OpenVINORunner(lambda: content, interface, bundle.precision)
        else:
            runner = OnnxRunner(lambda: content, interface, rounded)
    runner.name, runner.runtime, runner.file = artefact.form, artefact.runtime, artefact.file
    runner.path = str(bundle.path / artefact.file)
    return runner


@contextmanager
def running(bundle: Bundle, artefact: Artefact) -> Iterator[Callable[[NDArray | Inputs], Arrays]]:
    """Load an artefact and give the function that runs it.

    The function takes any number of images as the bundle does, [N, C, H, W] float32 or bytes [N, H, W, C], or where the
    network has several inputs all of them by name, and returns the outputs by name, in the order of the manifest;
    batches of a size the bundle does not accept are split or filled up.

    Raises:
        ExportError: it does not load, or an input has another shape.
    """
    with loaded(bundle, artefact) as runner:
        yield partial(run_images, bundle, runner)


@contextmanager
def loaded(bundle: Bundle, artefact: Artefact) -> Iterator[Runner]:
    """The runner of an artefact, loaded; raises ExportError where it does not load."""
    if artefact.obstacle:
        raise ExportError(f"{bundle.path / artefact.file} cannot run here: {artefact.obstacle}")
    with artefact_runner(bundle, artefact) as runner:
        yield runner


def run_images(bundle: Bundle, runner: Runner, images: NDArray | Inputs) -> Arrays:
    """Any number of images through a runner that is loaded, as `running` says."""
    inputs = named(images, bundle.inputs)
    runner.check_inputs(inputs)
    return run_in_batches(runner.infer, inputs, bundle.batch, bundle.batch.maximum)


@contextmanager
def running_first(
    bundle: Bundle, say: Callable[[str], None] = lambda reason: None, runtime: str = ""
) -> Iterator[tuple[Artefact, Callable[[NDArray | Inputs], Arrays]]]:
    """The first of `artefacts` that loads here, and what `running` gives for it; the arguments as in `loaded_first`.

    Raises:
        ExportError: none does.
    """
    with loaded_first(bundle, say, runtime) as (artefact, runner):
        yield artefact, partial(run_images, bundle, runner)


@contextmanager
def loaded_first(
    bundle: Bundle, say: Callable[[str], None] = lambda reason: None, runtime: str = ""
) -> Iterator[tuple[Artefact, Runner]]:
    """The first of `artefacts` that loads here, and its runner; `say` hears why others do not.

    `runtime` as in `artefacts`.

    Raises:
        ExportError: none does.
    """
    reasons = []
    with ExitStack() as stack:
        for artefact in artefacts(bundle, runtime):
            try:
                runner = stack.enter_context(loaded(bundle, artefact))
            except ExportError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                say(reason)
            yield artefact, runner
            return
    raise ExportError("; ".join(reasons))
