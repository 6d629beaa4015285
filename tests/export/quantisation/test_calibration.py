"""Ranges of activations: what each method covers, what is refused, and the cache that keeps them."""

from __future__ import annotations

import copy
import functools
import json
import logging
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from export import ExportError, fuse
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import source_name
from export.quantisation import calibration, calibration_cache
from export.quantisation.calibration import METHODS, InMemory, calibrate
from export.quantisation.quantise import is_input, quantised_values
from export.quantisation.scheme import CPU, Range
from export.quantisation.split_addition import split_addition
from tests.export.quantised import BATCH


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is: none of the user's own, and empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache" / "resnet-deploy" / "calibration"


@pytest.fixture(scope="module")
def graph(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> fx.GraphModule:
    return split_addition(fuse(calibrated["resnet20"], pictures["resnet20"], BATCH, "b").master)


@pytest.fixture(scope="module")
def inputs(pictures: dict[str, Tensor]) -> InMemory:
    return InMemory(torch.cat([pictures["resnet20"], pictures["resnet20"].flip(3)]).numpy())


class Chain(nn.Module):
    """A convolution of one pixel, one of which sums are easily known."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.one.weight[:] = torch.eye(3)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@functools.cache
def chain() -> fx.GraphModule:
    torch.manual_seed(0)
    return fuse(Chain().eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master


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


def test_minmax_is_what_was_seen(graph: fx.GraphModule, inputs: InMemory) -> None:
    found = calibrate(graph, inputs, "minmax")
    expected = seen(graph, inputs.images)
    assert found.ranges.keys() == expected.keys() and len(expected) > 30
    for name, limits in expected.items():
        np.testing.assert_allclose(found.ranges[name], limits, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (found.method, found.images, len(found.sha256)) == ("minmax", 16, 64)


@pytest.mark.parametrize("method", METHODS)
def test_no_range_covers_more_than_was_seen(graph: fx.GraphModule, inputs: InMemory, method: str) -> None:
    whole, found = calibrate(graph, inputs, "minmax").ranges, calibrate(graph, inputs, method).ranges
    narrower = 0
    for name, (low, high) in whole.items():
        assert low <= found[name][0] <= found[name][1] <= high
        narrower += found[name] != (low, high)
    assert bool(narrower) is (method != "minmax")


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
    assert high == pytest.approx(1.0, abs=0.01) and low == pytest.approx(-1.0, abs=0.01)
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


def test_one_sided_values_have_one_sided_ranges(graph: fx.GraphModule, inputs: InMemory) -> None:
    whole = calibrate(graph, inputs, "minmax").ranges
    positive = [name for name, (low, _) in whole.items() if low == 0.0]
    assert len(positive) > 15
    for method in ("percentile", "entropy"):
        ranges = calibrate(graph, inputs, method).ranges
        assert all(ranges[name][0] == 0.0 < ranges[name][1] for name in positive)


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        nn.init.constant_(self.one.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_always_zero_has_no_width(method: str) -> None:
    graph_module = fuse(Dead().eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master
    ranges = calibrate(graph_module, InMemory(noise(8)), method).ranges
    assert range_of(ranges, graph_module, "hidden") == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 5])
def test_the_size_of_batches_changes_nothing(
    graph: fx.GraphModule, inputs: InMemory, method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rounding, and for a value that this takes from one bin of a histogram to the next."""
    expected = calibrate(graph, inputs, method).ranges
    monkeypatch.setattr(calibration, "_BATCH", size)
    found = calibrate(graph, inputs, method).ranges
    assert found.keys() == expected.keys()
    width = {"minmax": 1e-5, "percentile": 2 / 2048, "entropy": 4 * 8 / 2048}[method]
    for name, (low, high) in calibrate(graph, inputs, "minmax").ranges.items():
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=width * max(-low, high), err_msg=name)


# what is refused, and said


@dataclass(frozen=True)
class Nothing:
    def __len__(self) -> int:
        return 0

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        raise AssertionError("expected not to be asked")


def test_no_pictures_are_refused(graph: fx.GraphModule) -> None:
    with pytest.raises(ExportError, match="expected pictures to calibrate on, got none"):
        calibrate(graph, Nothing())


def test_unknown_methods_are_refused(graph: fx.GraphModule, inputs: InMemory) -> None:
    with pytest.raises(ExportError, match="expected a calibration method of percentile, entropy, minmax, got 'max'"):
        calibrate(graph, inputs, "max")


class Overflow(nn.Module):
    """What is not 0 leaves the range of float32 in the second layer: as Inf, or as the difference of two."""

    def __init__(self, difference: bool) -> None:
        super().__init__()
        self.stem, self.second, self.last = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
        with torch.no_grad():
            self.stem.weight[:], self.second.weight[:] = 1e30, 1e30
            if difference:
                self.second.weight[:, 1] *= -1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.stem(x)))


@pytest.mark.parametrize("difference", [True, False], ids=["nan", "inf"])
@pytest.mark.parametrize("place", [0, 9, 15])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused(method: str, place: int, difference: bool) -> None:
    """In whichever batch."""
    graph_module = fuse(Overflow(difference).eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master
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

    def counted(*arguments: object) -> dict[str, Range]:
        ran.append("run")
        return ranges(*arguments)  # type: ignore[arg-type]

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
    again = split_addition(fuse(calibrated["resnet20"], pictures["resnet20"], BATCH, "b").master)
    calibrate(again, inputs, "minmax")
    assert runs == ["run"]


def with_weight(graph_module: fx.GraphModule) -> fx.GraphModule:
    changed = copy.deepcopy(graph_module)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    return changed


class Rectified(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def with_operator(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same weights."""
    torch.manual_seed(0)
    changed = fuse(Rectified().eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master
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


@pytest.mark.parametrize("content", [b"{}", b'{"x": [0, 1]}'])
def test_a_file_of_other_values_is_ignored(content: bytes, folder: Path) -> None:
    expected = calibrate(chain(), InMemory(IMAGES), "minmax")
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == expected


def open_to_a_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def readable_by_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o755)


def a_link(folder: Path) -> None:
    elsewhere = folder.parents[2] / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [open_to_a_group, readable_by_all, a_link], ids=lambda make: make.__name__)
def test_a_folder_that_is_not_private_is_not_used(
    make: Callable[[Path], None], folder: Path, runs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(folder)
    with caplog.at_level(logging.WARNING, logger="export.quantisation.calibration_cache"):
        first = calibrate(chain(), InMemory(IMAGES), "minmax")
        assert calibrate(chain(), InMemory(IMAGES), "minmax") == first
    assert runs == ["run", "run"] and not list(folder.iterdir())
    said = [record.getMessage() for record in caplog.records if record.name == "export.quantisation.calibration_cache"]
    assert said and all(message.startswith(f"{folder} is not private to this user") for message in said)
    hidden, high = range_of(first.ranges, chain(), "hidden")
    assert (hidden, high) == pytest.approx((IMAGES.min(), IMAGES.max()), rel=1e-6)


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
