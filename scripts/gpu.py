"""Prove every kernel and network on this machine's NVIDIA GPU and time them; what each step found is kept at once."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(ROOT)  # not scripts/, where `export` would be a script

from export.base.errors import ExportError, first_line, printable
from export.terminal.command_line import Parser, Steps, importing, leave, run_script
from export.terminal.commands import typed

LIMIT = 420
FOLDER = ROOT / "build" / "gpu"  # what the steps say and write
# What the steps need beside a GPU, by the name that is imported.
NEEDED = ("torch", "triton", "numpy", "scipy", "onnx", "onnxscript", "PIL", "rich", "safetensors", "sklearn", "jinja2",
          "pytest", "hypothesis")  # fmt: skip
# One of each kernel, by names of tests/kernels/cases.py.
SMOKE = ("conv small", "projection odd-image", "bottleneck c_mid-40-residual", "stem c_out-40", "head 70-channels")
OF_A_KERNEL = "tests/kernels/operators/test_operators.py::test_operator_on_a_gpu_equals_the_oracle"
NETWORKS = {"resnet50": 80, "resnet18": 60}  # and the seconds meant for each
BATCHES = ("1", "128", "8", "32")  # in the order in which they matter
GIB_PER_WORKER = 4
LAST_LINES = 40  # of what a step said that did not pass, for the record
PROVED = ("passed", "absent")  # how a step ends that others need not wait for
# A test's outcome, before its name where several processes run them and behind it elsewhere.
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<outcome>[A-Z]+) (?P<name>tests/\S+::.+?)"
    r"|(?P<name_>tests/\S+::.+?) (?P<outcome_>PASSED|FAILED|ERROR|SKIPPED)(?: .*)?) *$",
    re.MULTILINE,
)
FAILURE = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.+)$", re.MULTILINE)  # in pytest's summary, at its end
CHECKER_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) error", re.MULTILINE)
CHECKER_LINE = re.compile(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY)(\S.*)$", re.MULTILINE)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("gpu", __doc__)
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="SECONDS", help=f"for all steps; default {LIMIT}")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results", metavar="FOLDER", help="default docs/results"
    )
    args = parser.parse_args(argv)
    args.command = " ".join([typed("gpu"), *(sys.argv[1:] if argv is None else argv)])
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below

with importing("gpu"):
    from export.base.process import run_in_child
    from export.terminal.gpu_page import gpu_page
    from resnet.data.files import write_atomically


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("gpu", args, prove_and_time)


def prove_and_time(args: argparse.Namespace) -> int:
    """Run the steps in order and keep what each found; the exit code, 1 where one did not pass."""
    started = time.monotonic()
    check_arguments(args)
    machine = run_in_child("looking for a GPU", "", "export.benchmark.device:describe_gpu")
    shutil.rmtree(FOLDER, ignore_errors=True)  # of an earlier run
    FOLDER.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": args.command,
        "machine": machine,
        "limit_s": args.limit,
        "passed": False,
        "steps": [],
    }
    path = new_file(args.output, machine["gpu"], record["date"])
    run_steps(steps_of(machine["target"], FOLDER), record, path, started + args.limit)
    print(f"{path} and {path.with_suffix('.md').name} written")
    lacking = [entry for entry in record["steps"] if entry["needed"] and entry["status"] not in PROVED]
    for entry in lacking:
        print(f"{entry['step']}: {entry['status']}: {printable(entry['reason'])}; its output is in {entry['log']}")
    if not lacking:
        print(f"every kernel and network computes what it should on {machine['gpu']}; times are in the second file")
    elif any(entry["status"] == "failed" for entry in lacking):
        print("FAILED; do not deploy on this GPU")
    else:
        print(f"NO VERDICT on what did not finish; next: {typed('gpu')} --limit {2 * args.limit}")
    return 1 if lacking else 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is run."""
    if args.limit < 1:
        raise ExportError(f"--limit: expected seconds of at least 1, got {args.limit}")
    if not (ROOT / "tests").is_dir():
        raise ExportError(f"{ROOT} has no tests/: expected a checkout of the repository")
    if not args.output.is_dir():
        raise ExportError(f"--output: expected a folder that exists, got {args.output}")
    if missing := [name for name in NEEDED if not installed(name)]:
        another = "with another Python: make gpu PYTHON=.venv/bin/python"
        raise ExportError(f"not installed for {sys.executable}: {', '.join(missing)}; {another}")


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def new_file(folder: Path, gpu: str, date: str) -> Path:
    """<gpu>-<date>.json, or with a number where there is one: what was measured before stays."""
    stem = f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{date}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 1000))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


@dataclass(frozen=True)
class Reading:
    """What a step left behind.

    Attributes:
        facts: for the record.
        wrong: what is, if anything.
        lacking: what it would have said by its end, if it has not.
        absent: why it could not work here, if so.
    """

    facts: dict[str, Any]
    wrong: str = ""
    lacking: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Step:
    """A process of its own.

    Attributes:
        name: of the step.
        what: it does, in a few words.
        seconds: that it may need, which weigh against those of the steps behind it for the time left.
        command: to run.
        read: what it has written on stdout and stderr -> what was found, also where it did not end by itself.
        floors: a file of an earlier step that it takes, where that has written it.
        needed: whether the GPU is not proved right without it.
        absent: why it cannot run here, if so.
    """

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    read: Callable[[str], Reading]
    floors: Path | None = None
    needed: bool = True
    absent: str = ""


def steps_of(target: str, folder: Path) -> list[Step]:
    """All steps in order; what scripts write lies in `folder`."""
    exact = ("tests/kernels/test_exact_integers.py", "tests/export/test_exact_integers.py")
    networks = ("tests/export/lowering/test_cuda_graph.py", "tests/export/test_kernel_engines.py",
                "tests/scripts/test_benchmark.py")  # fmt: skip
    every_kernel = ("tests/kernels/jit", OF_A_KERNEL, "tests/kernels/test_launch.py")
    one_each = [f"{OF_A_KERNEL}[fp16-{case}]" for case in SMOKE]
    checker = (memory_checker(), "--tool", "memcheck", "--report-api-errors", "no")
    no_checker = "" if checker[0] else "no compute-sanitizer here"
    everything = ("--model", *NETWORKS, "--batch", *BATCHES)

    def script(
        name: str, what: str, seconds: float, read: Callable[[Path], Reading], command: Sequence[str], **more: Any
    ) -> Step:
        output = folder / f"{name.replace(' ', '-')}.json"
        command = (sys.executable, *command, "--output", str(output))
        return Step(name, what, seconds, command, lambda said: read(output), **more)

    def timed(
        name: str, what: str, seconds: float, model: str, *others: str, batches: Sequence[str] = BATCHES, **more: Any
    ) -> Step:
        command = ("scripts/benchmark.py", "--device", "cuda", "--model", model, "--batch", *batches, "--providers")
        return script(name, what, seconds, read_rows, (*command, "eager", "ours c3", "kernel engine", *others), **more)

    compiling = ("scripts/compile_kernels.py", "--targets", target, *everything)
    timing = ("scripts/tune.py", "--as-is", *everything)
    last: dict[str, Any] = {"needed": False, "batches": BATCHES[:2]}
    return [
        Step("smoke", "one of each kernel in fp16", 80, pytest(*one_each), read_tests),
        Step("exact integers", "operators and networks bit for bit", 120, pytest(*exact, parallel=True), read_tests),
        Step("kernels", "P1 of every kernel in every type", 160, pytest(*every_kernel, parallel=True), read_tests),
        Step("networks", "CUDA graphs, kernel engines", 100, pytest(*networks, parallel=True), read_tests),
        Step("memory", "memcheck of each kernel", 60, (*checker, *pytest(*one_each)), read_checker, absent=no_checker),
        # Compiles, on all cores, what the steps behind it launch, which find it in Triton's cache.
        script("floors", "predicted, of every kernel", 60, read_floors, compiling, needed=False),
        *(timed(model, "beside eager", seconds, model) for model, seconds in NETWORKS.items()),
        script("times", "of every kernel", 80, read_rows, timing, floors=folder / "floors.json"),
        timed("tensorrt", "and TensorRT-RTX", 40, "resnet50", "tensorrt", needed=False, absent=why_no_engines()),
        *(timed(f"compiled {model}", "max-autotune", 40, model, "torch.compile", **last) for model in NETWORKS),
    ]


def pytest(*cases: str, parallel: bool = False) -> tuple[str, ...]:
    """The command that runs the GPU's half of some tests; what may stop working one day is no fault there."""
    options = ("-m", "gpu", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-W", "default")
    shared = ("-n", str(workers())) if parallel and installed("xdist") else ()
    return (sys.executable, "-m", "pytest", *options, *shared, *cases)


def workers() -> int:
    """Processes that test at the same time: compiling is most of their work."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_WORKER)))


def memory_checker() -> str:
    """Where compute-sanitizer is; empty where it is not."""
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)])
    return shutil.which("compute-sanitizer", path=path) or ""


def why_no_engines() -> str:
    found = installed("tensorrt") or installed("tensorrt_rtx")
    return "" if found else "neither tensorrt nor tensorrt_rtx is installed"


def run_steps(steps: Sequence[Step], record: dict[str, Any], path: Path, deadline: float) -> None:
    """Run each step within its share of the time left; write the record as each begins and ends."""
    with Steps() as progress:
        for index, step in enumerate(steps):
            entry = {"step": step.name, "what": step.what, "needed": step.needed, "status": "begun", "reason": ""}
            record["steps"].append(entry)
            budget = share([other.seconds for other in steps[index:] if not other.absent], deadline - time.monotonic())
            log = FOLDER / f"{step.name.replace(' ', '-')}.log"
            entry |= {"log": str(log.relative_to(ROOT)), "command": [*step.command]}
            if step.absent:
                entry |= {"status": "absent", "reason": step.absent}
            elif budget < 1:
                entry |= {"status": "out of time", "reason": "none was left"}
            else:
                progress(f"{step.name}: {step.what}")
                entry["budget_s"] = round(budget, 1)
                write(record, path)
                entry |= run_step(step, budget, log)
            proved = all(entry["status"] in PROVED for entry in record["steps"] if entry["needed"])
            record["passed"] = proved and index + 1 == len(steps)
            write(record, path)


def share(seconds: Sequence[float], left: float) -> float:
    """Of the time left for steps that want so many seconds, what the first gets: time that it leaves is the others'."""
    return left * seconds[0] / sum(seconds) if seconds else 0.0


def write(record: Mapping[str, Any], path: Path) -> None:
    write_atomically(path, f"{json.dumps(record, indent=1)}\n".encode())
    try:
        page = gpu_page(record, path.name)
    except Exception as error:  # whatever a step found must not cost the next ones theirs
        page = f"{path.name} cannot be shown: {type(error).__name__}: {first_line(error)}\n"
    write_atomically(path.with_suffix(".md"), page.encode())


def run_step(step: Step, budget: float, log: Path) -> dict[str, Any]:
    """Run a step and read what it left: its status, the reason for that, how long it took and what was found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if step.read is read_checker:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor by itself: what is beyond it is nobody's
    floors = ("--floors", str(step.floors)) if step.floors and step.floors.exists() else ()
    started, command = time.monotonic(), (*step.command, *floors)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "250"},  # room for why a test failed
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(budget)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    said = log.read_text(errors="replace")
    try:
        found = step.read(said)
    except Exception as error:  # whatever one step leaves must not cost the others theirs
        found = Reading({}, f"what it left cannot be read: {type(error).__name__}: {first_line(error)}")
    if found.absent:
        status, reason = "absent", found.absent
    elif found.wrong:
        status, reason = "failed", found.wrong
    elif code is None:
        status, reason = "out of time", f"ended after {budget:.0f} s: {last_words(said)}"
    elif code:
        status, reason = "failed", f"{how_ended(code)}: {last_words(said)}"
    else:
        status, reason = ("failed", found.lacking) if found.lacking else ("passed", "")
    entry = {"status": status, "reason": reason, "seconds": round(time.monotonic() - started, 1), **found.facts}
    return entry if status == "passed" else {**entry, "said": said.splitlines()[-LAST_LINES:]}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # as long as the driver holds it, it does not end
        process.wait(10)


def how_ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def last_words(said: str) -> str:
    return next((printable(line.strip()) for line in reversed(said.splitlines()) if line.strip()), "it said nothing")


def read_tests(said: str) -> Reading:
    """How many tests passed, and which did not."""
    outcomes: dict[str, str] = {}
    for found in OUTCOME.finditer(said):
        name, outcome = found["name"] or found["name_"], found["outcome"] or found["outcome_"]
        if outcomes.get(name) not in ("FAILED", "ERROR"):  # one that failed may pass its end
            outcomes[name] = outcome
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    skipped = sum(outcome == "SKIPPED" for outcome in outcomes.values())
    passed = len(outcomes) - len(failed) - skipped
    reasons = dict(FAILURE.findall(said))
    failed = [f"{name}: {reasons[name]}" if name in reasons else name for name in failed]
    wrong = f"{len(failed)} of {len(outcomes)} failed, the first {failed[0]}" if failed else ""
    lacking = "" if passed else "no test has passed"
    return Reading({"tests": {"passed": passed, "skipped": skipped, "failed": failed}}, wrong, lacking)


def read_checker(said: str) -> Reading:
    """What the tests and the checker say; it may know the GPU and yet not be able to look into it."""
    tests, summary = read_tests(said), CHECKER_SUMMARY.search(said)
    lines = [printable(line) for line in CHECKER_LINE.findall(said)]
    if refused := [line for line in lines if "not supported" in line]:
        return Reading(tests.facts, absent=refused[0])
    if summary is None:
        return replace(tests, lacking="the checker has not said what it found")
    errors = int(summary[1])
    wrong = f"{errors} errors, the first: {lines[0]}" if errors else tests.wrong
    return replace(tests, facts={**tests.facts, "errors": errors}, wrong=wrong)


def read_rows(output: Path) -> Reading:
    """What benchmark.py or tune.py has written so far."""
    found = written(output)
    if not found:
        return Reading({}, lacking="it has written nothing")
    rows = [row for result in found.get("results", [found]) for row in result.get("rows", [])]
    wrong = dict.fromkeys(row.get("provider") or row["problem"] for row in rows if row["status"] == "failed")
    return Reading({"found": found}, f"wrong or not to be run: {', '.join(wrong)}" if wrong else "")


def read_floors(output: Path) -> Reading:
    """Of what compile_kernels.py has written, what is at fault; the floors are in what tune.py writes."""
    kernels = written(output).get("kernels", [])
    faulty = [f"{kernel['problem']}: {'; '.join(kernel['faults'])}" for kernel in kernels if kernel["faults"]]
    wrong = f"{len(faulty)} of {len(kernels)} kernels are at fault, the first {faulty[0]}" if faulty else ""
    return Reading({"kernels": len(kernels), "faulty": faulty}, wrong, "" if kernels else "it has written nothing")


def written(output: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(output.read_text())
    except (OSError, ValueError):
        return {}
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no step outlives this process
    leave(main())
