"""Ranges of activations: what each method covers, what is refused, and the cache that keeps them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from export import ExportError, fuse
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import source_name
from export.quantisation import calibration, calibration_cache
from export.quantisation.calibration import METHODS, Calibration, InMemory, calibrate
from export.quantisation.quantise import is_input, quantised_values
from export.quantisation.scheme import CPU, Range
from export.quantisation.split_addition import split_addition
from tests.conftest import Made
from tests.export.networks import BATCH, Called

SINGLE = 2.0**-24 * 2**8  # float32: some hundred roundings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is: none of the user's own, and empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache" / "resnet-deploy" / "calibration"


@pytest.fixture(scope="module")
def graph(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> fx.GraphModule:
    return split_addition(fuse(calibrated["resnet8"], pictures["resnet8"], BATCH, "b").master)


@pytest.fixture(scope="module")
def inputs(pictures: dict[str, Tensor]) -> InMemory:
    return InMemory(torch.cat([pictures["resnet8"], pictures["resnet8"].flip(3)]).numpy())


def network(call: Callable[[Tensor, Any], Tensor]) -> fx.GraphModule:
    """Of two convolutions of one pixel; the first hands on what it is given."""
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        one.weight[:] = torch.eye(3)[:, :, None, None]
    return fuse(Called(call, one=one, two=two).eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master


@functools.cache
def chain() -> fx.GraphModule:
    return network(lambda x, m: m.two(m.one(x)))


def noise(count: int = 104) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32)


def range_of(ranges: dict[str, Range], graph_module: fx.GraphModule, what: str) -> Range:
    """Of the network's `input`, or of the `hidden` value between the two convolutions of a chain."""
    (name,) = (
        str(source_name(node)) for node in quantised_values(graph_module, CPU) if is_input(node) is (what == "input")
    )
    return ranges[name]


def seen(graph_module: fx.GraphModule, images: NDArray[np.float32]) -> dict[str, Range]:
    """What each value reaches, all images at once, by plain torch in float64."""
    interpreter = GraphInterpreter(graph_module, {})
    interpreter.values = {}
    with torch.no_grad():
        interpreter.run(torch.from_numpy(images).double())
    wanted = quantised_values(graph_module, CPU)
    values = {str(source_name(node)): interpreter.values[node.name] for node in wanted}
    return {name: (value.min().item(), value.max().item()) for name, value in values.items()}


# the methods


@pytest.fixture(scope="module")
def found(graph: fx.GraphModule, inputs: InMemory) -> Mapping[str, Calibration]:
    """By method."""
    return Made(lambda method: calibrate(graph, inputs, method))


def test_minmax_is_what_was_seen(found: Mapping[str, Calibration], graph: fx.GraphModule, inputs: InMemory) -> None:
    expected, minmax = seen(graph, inputs.images), found["minmax"]
    assert minmax.ranges.keys() == expected.keys() and len(expected) > 10
    for name, limits in expected.items():
        np.testing.assert_allclose(minmax.ranges[name], limits, rtol=SINGLE, atol=SINGLE, err_msg=name)
    assert (minmax.method, minmax.images, len(minmax.sha256)) == ("minmax", 16, 64)


@pytest.mark.parametrize("method", METHODS)
def test_no_range_covers_more_than_was_seen(found: Mapping[str, Calibration], method: str) -> None:
    """And one-sided values have one-sided ranges."""
    narrower, positive, ranges = 0, 0, found[method].ranges
    for name, (low, high) in found["minmax"].ranges.items():
        assert low <= ranges[name][0] <= ranges[name][1] <= high
        narrower += ranges[name] != (low, high)
        positive += low == 0.0
        assert low != 0.0 or ranges[name][0] == 0.0 < ranges[name][1]
    assert bool(narrower) is (method != "minmax") and positive > 5


def with_outlier(value: float) -> InMemory:
    images = noise()
    images[40, 1, 7, 9] = value
    return InMemory(images)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_an_outlier_is_cut_off_inside_but_not_of_the_input(method: str, sign: int) -> None:
    graph_module = chain()
    ranges = calibrate(graph_module, with_outlier(sign * 60.0), method).ranges
    (input_low, input_high), (low, high) = (range_of(ranges, graph_module, what) for what in ("input", "hidden"))
    assert (input_high if sign > 0 else -input_low) == 60.0
    assert 2.5 < high < 8 and 2.5 < -low < 8
    reached = range_of(calibrate(graph_module, with_outlier(sign * 60.0), "minmax").ranges, graph_module, "hidden")
    assert (reached[1] if sign > 0 else -reached[0]) == pytest.approx(60.0)


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    graph_module, images = chain(), noise()
    images[:] = np.random.default_rng(1).uniform(-1, 1, images.shape)
    images.reshape(-1)[:: images.size // 20] = 9.0  # 20 of 319488: fewer than that
    low, high = range_of(calibrate(graph_module, InMemory(images)).ranges, graph_module, "hidden")
    assert max(abs(high - 1.0), abs(low + 1.0)) < 2 * 9.0 / 2048  # bins
    images.reshape(-1)[:: images.size // 100] = 9.0  # and 100 are more
    assert range_of(calibrate(graph_module, InMemory(images)).ranges, graph_module, "hidden")[1] == pytest.approx(9.0)


def test_the_share_counts_every_picture() -> None:
    """Not one histogram per batch, and not the last one's."""
    graph_module, images = chain(), noise() * 0.01
    images[:8] *= 300
    _, high = range_of(calibrate(graph_module, InMemory(images)).ranges, graph_module, "hidden")
    assert high > 6


def test_entropy_cuts_more_of_a_long_tail_than_of_a_short_one() -> None:
    graph_module, generator = chain(), np.random.default_rng(0)
    shares = {}
    for name, images in (
        ("flat", generator.uniform(-1, 1, (104, 3, 32, 32))),
        ("bell", generator.normal(size=(104, 3, 32, 32))),
        ("long", generator.standard_t(2.5, size=(104, 3, 32, 32))),
    ):
        found = [
            range_of(
                calibrate(graph_module, InMemory(images.astype(np.float32)), method).ranges, graph_module, "hidden"
            )
            for method in ("entropy", "minmax")
        ]
        shares[name] = max(map(abs, found[0])) / max(map(abs, found[1]))
    assert shares["long"] < 0.5 < 0.8 < shares["bell"] and shares["flat"] > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_always_zero_has_no_width(method: str) -> None:
    graph_module = network(lambda x, m: m.two(torch.relu(m.one(x) - 100.0)))
    ranges = calibrate(graph_module, InMemory(noise(8)), method).ranges
    assert (0.0, 0.0) in [ranges[str(source_name(node))] for node in quantised_values(graph_module, CPU)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 5])
def test_the_size_of_batches_changes_nothing(
    found: Mapping[str, Calibration],
    graph: fx.GraphModule,
    inputs: InMemory,
    method: str,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for rounding, and for a value that this takes from one bin of a histogram to the next."""
    expected, whole = found[method].ranges, found["minmax"].ranges
    monkeypatch.setattr(calibration, "_BATCH", size)
    ranges = calibrate(graph, inputs, method).ranges
    assert ranges.keys() == expected.keys()
    width = {"minmax": SINGLE, "percentile": 2 / 2048, "entropy": 4 * 8 / 2048}[method]
    for name, (low, high) in whole.items():
        np.testing.assert_allclose(ranges[name], expected[name], rtol=0, atol=width * max(-low, high), err_msg=name)


# what is refused, and said


def test_no_pictures_and_unknown_methods_are_refused(graph: fx.GraphModule, inputs: InMemory) -> None:
    with pytest.raises(ExportError, match="expected pictures to calibrate on, got none"):
        calibrate(graph, InMemory(inputs.images[:0]))
    with pytest.raises(ExportError, match="expected a calibration method of percentile, entropy, minmax, got 'max'"):
        calibrate(graph, inputs, "max")


def overflow(difference: bool) -> fx.GraphModule:
    """What is not 0 leaves the range of float32 in the second layer: as Inf, or as the difference of two."""
    stem, second, last = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
    with torch.no_grad():
        stem.weight[:], second.weight[:] = 1e30, 1e30
        if difference:
            second.weight[:, 1] *= -1
    model = nn.Sequential(OrderedDict(stem=stem, second=second, last=last)).eval()
    return fuse(model, torch.zeros(1, 3, 32, 32), BATCH, "b").master


@pytest.mark.parametrize("difference", [True, False], ids=["nan", "inf"])
def test_values_that_are_not_finite_are_refused(difference: bool) -> None:
    """In whichever batch."""
    graph_module = overflow(difference)
    for method, place in itertools.product(METHODS, (0, 9, 15)):
        images = np.zeros((16, 3, 32, 32), np.float32)
        images[place, :, 3, 4] = 1.0
        for _ in range(2):  # nothing of it is kept
            with pytest.raises(ExportError, match=r"^second: NaN or Inf on the calibration images$"):
                calibrate(graph_module, InMemory(images), method)


def test_few_pictures_are_enough_but_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    graph_module = chain()
    calibrate(graph_module, InMemory(noise(99)), "minmax")
    calibrate(graph_module, InMemory(noise(100)), "minmax")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["calibrating on 99 images: at least 100 are wanted"]


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.base.progress._SECONDS", 0.0)
    said: list[str] = []
    calibrate(chain(), InMemory(noise(16)), progress=said.append)
    assert said == [
        f"calibrate: {what}, {done} of 16 images" for what in ("ranges of 2 values", "histograms") for done in (8, 16)
    ]


# the cache


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the network was run through."""
    ran: list[str] = []
    ranges = calibration._ranges

    def counted(*arguments: Any) -> dict[str, Range]:
        ran.append("run")
        return ranges(*arguments)

    monkeypatch.setattr(calibration, "_ranges", counted)
    return ran


@pytest.mark.parametrize("method", METHODS)
def test_the_second_time_the_network_is_not_run(
    graph: fx.GraphModule, inputs: InMemory, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(graph, inputs, method)
    (file,) = folder.iterdir()
    assert file.suffix == ".json" and stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was run")

    monkeypatch.setattr(calibration._Observer, "observe", refuse)
    assert calibrate(graph, inputs, method) == first


def test_another_network_of_the_same_weights_asks_the_same_file(
    calibrated: dict[str, nn.Module],
    pictures: dict[str, Tensor],
    graph: fx.GraphModule,
    inputs: InMemory,
    runs: list[str],
) -> None:
    calibrate(graph, inputs, "minmax")
    again = split_addition(fuse(calibrated["resnet8"], pictures["resnet8"], BATCH, "b").master)
    calibrate(again, inputs, "minmax")
    assert runs == ["run"]


def with_weight(graph_module: fx.GraphModule) -> fx.GraphModule:
    changed = copy.deepcopy(graph_module)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    return changed


def with_operator(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same weights."""
    changed = network(lambda x, m: m.two(torch.relu(m.one(x))))
    for name, value in graph_module.named_parameters():
        assert torch.equal(value, changed.get_parameter(name))
    return changed


IMAGES = noise(8)
DIFFERENT: dict[str, Callable[[], tuple[fx.GraphModule, NDArray[np.float32], str]]] = {
    "weight": lambda: (with_weight(chain()), IMAGES, "minmax"),
    "operator": lambda: (with_operator(chain()), IMAGES, "minmax"),
    "method": lambda: (chain(), IMAGES, "entropy"),
    "image": lambda: (chain(), np.where(np.arange(8)[:, None, None, None] == 7, IMAGES + 1e-3, IMAGES), "minmax"),
    "order": lambda: (chain(), IMAGES[::-1].copy(), "minmax"),
    "fewer": lambda: (chain(), IMAGES[:7], "minmax"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_changes_the_result_changes_the_file(case: str, runs: list[str], folder: Path) -> None:
    calibrate(chain(), InMemory(IMAGES), "minmax")
    calibrate(chain(), InMemory(IMAGES.copy()), "minmax")
    assert runs == ["run"]
    graph_module, images, method = DIFFERENT[case]()
    calibrate(graph_module, InMemory(images.astype(np.float32)), method)
    assert runs == ["run", "run"] and len(list(folder.iterdir())) == 2


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-5],
    "binary": lambda content: bytes(range(256)),
    "a list": lambda content: b"[1, 2]",
    "no values": lambda content: b"{}",
    "other values": lambda content: b'{"x": [0, 1]}',
    "a number": lambda content: b"7",
    "null": lambda content: b"null",
    "one limit": lambda content: b'{"x": [1]}',
    "three limits": lambda content: b'{"x": [1, 2, 3]}',
    "words": lambda content: b'{"x": ["low", "high"]}',
    "nan": lambda content: b'{"x": [NaN, 1]}',
    "infinite": lambda content: b'{"x": [0, 1e999]}',
    "upside down": lambda content: b'{"x": [2, 1]}',
    "huge": lambda content: b'{"x": [0, ' + b"9" * 400 + b"]}",
    "very huge": lambda content: b'{"x": [0, ' + b"9" * 9000 + b"]}",
    "deep": lambda content: b"[" * 100_000,
    "a dictionary": lambda content: b'{"x": {"low": 0, "high": 1}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_file_is_ignored_and_replaced(case: str, runs: list[str], folder: Path) -> None:
    expected = calibrate(chain(), InMemory(IMAGES), "minmax")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(HOSTILE[case](whole))
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == expected
    assert runs == ["run", "run"] and file.read_bytes() == whole and len(list(folder.iterdir())) == 1


def open_to_others(mode: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        folder.chmod(mode)

    return make


def a_link(folder: Path) -> None:
    elsewhere = folder.parents[2] / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)


OPEN = {"to a group": open_to_others(0o770), "readable by all": open_to_others(0o755), "a link": a_link}


@pytest.mark.parametrize("case", OPEN)
def test_a_folder_that_is_not_private_is_not_used(
    case: str, folder: Path, runs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    OPEN[case](folder)
    with caplog.at_level(logging.WARNING, logger="export.quantisation.calibration_cache"):
        first = calibrate(chain(), InMemory(IMAGES), "minmax")
        assert calibrate(chain(), InMemory(IMAGES), "minmax") == first
    assert runs == ["run", "run"] and not list(folder.iterdir())
    said = [record.getMessage() for record in caplog.records if record.name == "export.quantisation.calibration_cache"]
    assert said and all(message.startswith(f"{folder} is not private to this user") for message in said)
    hidden, high = range_of(first.ranges, chain(), "hidden")
    assert (hidden, high) == pytest.approx((IMAGES.min(), IMAGES.max()), rel=SINGLE)


def test_what_others_put_into_an_open_folder_is_not_believed(folder: Path, runs: list[str]) -> None:
    expected = calibrate(chain(), InMemory(IMAGES), "minmax")
    (file,) = folder.iterdir()
    record = {name: [low / 2, high / 2] for name, (low, high) in json.loads(file.read_bytes()).items()}
    file.write_text(json.dumps(record))
    assert calibrate(chain(), InMemory(IMAGES), "minmax") != expected and runs == ["run"]  # the user's own is
    folder.chmod(0o777)
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == expected


@pytest.mark.parametrize("blocked", ["file", "disk"])
def test_without_a_cache_the_result_is_the_same(
    blocked: str, folder: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    if blocked == "file":
        folder.parent.mkdir(parents=True)
        folder.write_text("in the way")
    else:

        def full(*arguments: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("export.quantisation.calibration_cache.tempfile.NamedTemporaryFile", full)
    first = calibrate(chain(), InMemory(IMAGES), "minmax")
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == first and len(runs) == 2


def test_without_a_place_named_it_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    calibration_cache.write("key", {"x": (0.0, 1.0)})
    assert (tmp_path / "home" / ".cache" / "resnet-deploy" / "calibration" / "key.json").is_file()
    assert calibration_cache.read("key") == {"x": (0.0, 1.0)} and calibration_cache.read("other") is None
