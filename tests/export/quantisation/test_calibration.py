"""Ranges of activations: what each method covers, what is refused, and the cache that keeps them."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from export import Batch, ExportError, fuse
from export.base.progress import silent
from export.fusion.nodes import deep_copy, moves_data, source_name
from export.quantisation import calibration
from export.quantisation.calibration import DEFAULT_METHOD, METHODS, Calibration, InMemory, calibrate
from export.quantisation.quantise import is_input, quantised_values
from export.quantisation.scheme import CPU, Range
from export.quantisation.split_addition import split_addition
from tests.conftest import Made
from tests.export.networks import BATCH, Called, Fused, values_of

SINGLE = 2.0**-24 * 2**8  # float32: some hundred roundings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is: none of the user's own, and empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resnet-deploy" / "calibration"


@pytest.fixture(scope="module")
def graph(resnet8: Fused) -> fx.GraphModule:
    return split_addition(fuse(resnet8.model, resnet8.images, BATCH, "b").master)


@pytest.fixture(scope="module")
def inputs(resnet8: Fused) -> InMemory:
    return InMemory(torch.cat([resnet8.images, resnet8.images.flip(3)]).numpy())


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


def chain_range(images: NDArray[Any], method: str = DEFAULT_METHOD, of_input: bool = False) -> Range:
    """Of the value between the two convolutions of a chain, or of its input."""
    ranges = calibrate(chain(), InMemory(images.astype(np.float32)), method).ranges
    (name,) = (str(source_name(node)) for node in quantised_values(chain(), CPU) if is_input(node) is of_input)
    return ranges[name]


@pytest.fixture(scope="module")
def found(graph: fx.GraphModule, inputs: InMemory) -> Mapping[str, Calibration]:
    """By method."""
    return Made(lambda method: calibrate(graph, inputs, method))


def test_minmax_is_what_was_seen(found: Mapping[str, Calibration], graph: fx.GraphModule, inputs: InMemory) -> None:
    names = [name for node in graph.graph.nodes if not moves_data(node) and (name := source_name(node))]
    assert len(set(names)) == len(names) > 10
    values, minmax = values_of(graph, torch.from_numpy(inputs.images).double()), found["minmax"]
    seen = {str(source_name(node)): values[node.name].aminmax() for node in quantised_values(graph, CPU)}
    assert minmax.ranges.keys() == seen.keys() and len(seen) > 10
    for name, limits in seen.items():
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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_an_outlier_is_cut_off_inside_but_not_of_the_input(method: str, sign: int) -> None:
    images = noise()
    images[40, 1, 7, 9] = sign * 60.0
    assert sign * chain_range(images, method, of_input=True)[sign > 0] == 60.0
    low, high = chain_range(images, method)
    assert 2.5 < high < 8 and 2.5 < -low < 8
    assert sign * chain_range(images, "minmax")[sign > 0] == pytest.approx(60.0)


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    images = np.random.default_rng(1).uniform(-1, 1, (104, 3, 32, 32))
    images.reshape(-1)[:: images.size // 20] = 9.0  # 20 of 319488: fewer than that
    low, high = chain_range(images)
    assert max(abs(high - 1.0), abs(low + 1.0)) < 2 * 9.0 / 2048  # bins
    images.reshape(-1)[:: images.size // 100] = 9.0  # and 100 are more
    assert chain_range(images)[1] == pytest.approx(9.0)


def test_entropy_cuts_more_of_a_long_tail_than_of_a_short_one() -> None:
    generator, shape = np.random.default_rng(0), (104, 3, 32, 32)
    tails = {"flat": generator.uniform(-1, 1, shape), "bell": generator.normal(size=shape)}
    shares = {}
    for name, images in (tails | {"long": generator.standard_t(2.5, shape)}).items():
        kept, reached = (max(map(abs, chain_range(images, method))) for method in ("entropy", "minmax"))
        shares[name] = kept / reached
    assert shares["long"] < 0.5 < 0.8 < shares["bell"] and shares["flat"] > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_always_zero_has_no_width(method: str) -> None:
    graph_module = network(lambda x, m: m.two(torch.relu(m.one(x) - 100.0)))
    ranges = calibrate(graph_module, InMemory(noise(8)), method).ranges
    assert (0.0, 0.0) in [ranges[str(source_name(node))] for node in quantised_values(graph_module, CPU)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 5])
def test_the_size_of_batches_changes_nothing(
    found: Mapping[str, Calibration], graph: fx.GraphModule, inputs: InMemory, method: str, size: int
) -> None:
    """But for rounding, and for a value that this takes from one bin of a histogram to the next."""
    expected, whole = found[method].ranges, found["minmax"].ranges
    ranges = calibration._ranges(graph, inputs, method, Batch(1, size, size), silent)
    assert ranges.keys() == expected.keys()
    width = {"minmax": SINGLE, "percentile": 2 / 2048, "entropy": 4 * 8 / 2048}[method]
    for name, (low, high) in whole.items():
        np.testing.assert_allclose(ranges[name], expected[name], rtol=0, atol=width * max(-low, high), err_msg=name)


@dataclass(frozen=True)
class Irregular:
    """One picture, then seven, then one, …: at most as many as are asked for."""

    images: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        start = 0
        for count in itertools.cycle((1, 7)):
            yield self.images[start : (start := start + min(count, size))]
            if start >= len(self):
                return


@pytest.mark.parametrize("method", METHODS)
def test_pictures_may_come_in_batches_of_any_size(method: str) -> None:
    """What is computed on is as many as fit at once, and of a static batch never fewer."""
    images, fixed = noise(61), Batch(20, 20, 20)
    whole, parts = (calibration._ranges(chain(), made(images), method, fixed, silent) for made in (InMemory, Irregular))
    assert parts == whole


def test_no_pictures_and_unknown_methods_are_refused() -> None:
    with pytest.raises(ExportError, match="expected pictures to calibrate on, got none"):
        calibrate(chain(), InMemory(noise(0)))
    with pytest.raises(ExportError, match="expected a calibration method of percentile, entropy, minmax, got 'max'"):
        calibrate(chain(), InMemory(noise(1)), "max")


def overflow(difference: bool) -> fx.GraphModule:
    """What is not 0 leaves the range of float32 in the second layer: as Inf, or as the difference of two."""
    stem, second, last = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
    with torch.no_grad():
        stem.weight[:], second.weight[:] = 1e30, 1e30
        second.weight[:, 1] *= -1 if difference else 1
    model = Called(lambda x, m: m.last(m.second(m.stem(x))), stem=stem, second=second, last=last)
    return fuse(model.eval(), torch.zeros(1, 3, 32, 32), BATCH, "b").master


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
    for count in (99, 100):
        calibrate(chain(), InMemory(noise(count)), "minmax")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["calibrating on 99 images: at least 100 are wanted"]


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.base.progress._SECONDS", 0.0)
    said: list[str] = []
    calibrate(chain(), InMemory(noise(40)), "entropy", progress=said.append)
    for what in ("ranges of 2 values", "histograms of 1 value"):
        assert [said.pop(0) for _ in range(2)] == [f"calibrate: {what}, {done} of 40 images" for done in (32, 40)]
    assert not said


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


def with_weight(graph_module: fx.GraphModule) -> fx.GraphModule:
    changed = deep_copy(graph_module)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    return changed


IMAGES = noise(8)
DIFFERENT: dict[str, Callable[[], tuple[fx.GraphModule, NDArray[np.float32], str]]] = {
    "weight": lambda: (with_weight(chain()), IMAGES, "minmax"),
    "operator": lambda: (network(lambda x, m: m.two(torch.relu(m.one(x)))), IMAGES, "minmax"),
    "method": lambda: (chain(), IMAGES, "entropy"),
    "image": lambda: (chain(), np.where(np.arange(8)[:, None, None, None] == 7, IMAGES + 1e-3, IMAGES), "minmax"),
    "order": lambda: (chain(), IMAGES[::-1].copy(), "minmax"),
    "fewer": lambda: (chain(), IMAGES[:7], "minmax"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_changes_the_result_changes_the_file(case: str, runs: list[str], folder: Path) -> None:
    first = calibrate(chain(), InMemory(IMAGES), "minmax")
    again = network(lambda x, m: m.two(m.one(x)))  # another of the same weights
    assert calibrate(again, InMemory(IMAGES.copy()), "minmax") == first and runs == ["run"]
    (file,) = folder.iterdir()
    assert file.suffix == ".json" and file.stat().st_mode & 0o077 == 0
    graph_module, images, method = DIFFERENT[case]()
    calibrate(graph_module, InMemory(images.astype(np.float32)), method)
    assert runs == ["run", "run"] and len(list(folder.iterdir())) == 2


HOSTILE: dict[str, bytes] = {
    "cut short": b'{"x": [0',
    "a list": b"[1, 2]",
    "other values": b'{"x": [0, 1]}',
    "one limit": b'{"x": [1]}',
    "a number for limits": b'{"x": 1}',
    "nan": b'{"x": [NaN, 1]}',
    "infinite": b'{"x": [0, 1e999]}',
    "upside down": b'{"x": [2, 1]}',
    "beyond a float": b'{"x": [0, ' + b"9" * 400 + b"]}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_file_is_ignored_and_replaced(case: str, runs: list[str], folder: Path) -> None:
    expected = calibrate(chain(), InMemory(IMAGES), "minmax")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(HOSTILE[case])
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == expected
    assert runs == ["run", "run"] and file.read_bytes() == whole and len(list(folder.iterdir())) == 1


def test_what_others_could_write_is_no_cache(folder: Path, runs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    expected = calibrate(chain(), InMemory(IMAGES), "minmax")
    (file,) = folder.iterdir()
    record = {name: [low / 2, high / 2] for name, (low, high) in json.loads(file.read_bytes()).items()}
    file.write_text(json.dumps(record))
    assert calibrate(chain(), InMemory(IMAGES), "minmax") != expected and runs == ["run"]  # the user's own is
    folder.chmod(0o755)
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == expected
    assert runs == ["run", "run"] and json.loads(file.read_bytes()) == record  # nor is anything written there
    said = [record.getMessage() for record in caplog.records if record.name == "export.base.private_cache"]
    assert said and all(message.startswith(f"{folder} is not private to this user") for message in said)


@pytest.mark.parametrize("blocked", ["file", "disk"])
def test_without_a_cache_the_result_is_the_same(
    blocked: str, folder: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    if blocked == "file":
        folder.parent.mkdir(parents=True)
        folder.write_text("in the way")
    else:
        full = Mock(side_effect=OSError(28, "No space left on device"))
        monkeypatch.setattr("export.base.private_cache.tempfile.NamedTemporaryFile", full)
    first = calibrate(chain(), InMemory(IMAGES), "minmax")
    assert calibrate(chain(), InMemory(IMAGES), "minmax") == first and len(runs) == 2
