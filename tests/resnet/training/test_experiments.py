"""The experiments: what they measure, what they recommend, and that plain networks show what they are there to show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from resnet.data.preprocessing import Preprocessing
from resnet.models import create_model
from resnet.training.experiments import (
    REGULARISER_SEEDS,
    Outcome,
    Trial,
    cost,
    gradient_norms,
    recommend,
    regulariser_trials,
    run_trial,
    standard_error,
)
from resnet.training.loop import Epoch
from resnet.training.reports import EXPERIMENTS, compare_report, depths_report, regularisers_report
from resnet.training.settings import TrainingConfig
from tests.resnet.training.conftest import Data

PNG = b"\x89PNG\r\n\x1a\n"


def outcome(model: str, accuracy: float, label: str | None = None, **changes: float) -> Outcome:
    epoch = Epoch(1, 0.1, changes.get("loss", 1.0), 0.5, 1.0, accuracy, 1.0)
    gradients = {"conv1": changes.get("first", 1.0), "layer1.0.conv1": 0.5, "layer2.0.downsample.0": 99.0, "fc": 77.0}
    trial = Trial(label or model, model, TrainingConfig())
    return Outcome(trial, (epoch,), accuracy, accuracy, gradients, gradients)


def test_gradient_norms_are_those_of_autograd_and_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", in_channels=1, dropout=0.5).eval()
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = gradient_norms(model, images, labels)
    assert not model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    model.dropout.eval()
    F.cross_entropy(model(images), labels).backward()
    assert [*norms] == [name for name, module in model.named_modules() if hasattr(module, "stride") or name == "fc"]
    for name, norm in norms.items():
        weight = model.get_parameter(f"{name}.weight")
        assert weight.grad is not None
        # the same operations in the same order, but for the norm of one gradient
        assert norm == pytest.approx(weight.grad.norm().item(), rel=weight.numel() ** 0.5 * 2**-23), name


def test_before_training_gradients_of_a_deep_network_are_spread_where_it_is_plain(digits: Data) -> None:
    splits, preprocessing = digits
    images = torch.from_numpy(splits.train.inputs(range(64), preprocessing))
    labels = torch.from_numpy(splits.train.labels[:64])
    spread = {}
    for name in ("plain56", "resnet56"):
        torch.manual_seed(0)
        norms = gradient_norms(create_model(name, in_channels=1), images, labels)
        trunk = [norm for layer, norm in norms.items() if "downsample" not in layer and layer != "fc"]
        spread[name] = max(trunk) / min(trunk)
    assert spread["plain56"] > 20 * spread["resnet56"], spread


def test_the_shallowest_within_one_standard_error_is_recommended() -> None:
    outcomes = [outcome("resnet8", 0.90), outcome("resnet20", 0.955), outcome("resnet56", 0.96)]
    chosen, error = recommend(outcomes, 100)
    assert chosen.trial.model == "resnet20" and error == pytest.approx((98 / 104 * 6 / 104 / 104) ** 0.5)
    assert recommend(outcomes, 100_000)[0].trial.model == "resnet56"
    assert recommend(outcomes, 10)[0].trial.model == "resnet8"
    # an accuracy of all is not certain
    assert standard_error(1.0, 143) == pytest.approx((145 / 147 * 2 / 147 / 147) ** 0.5)
    assert standard_error(0.5, 10_000) == pytest.approx(0.5 / 10_004**0.5)


def test_cost_counts_multiply_adds_and_weights() -> None:
    preprocessing = Preprocessing((8, 8), (8, 8), (0.0,), (1.0,))
    model = create_model("resnet8", in_channels=1, num_classes=5)
    spent = cost(model, preprocessing)
    first = 8 * 8 * 16 * 9
    stage1 = 2 * 8 * 8 * 16 * 16 * 9
    stage2 = 4 * 4 * 32 * (16 * 9 + 32 * 9 + 16)
    stage3 = 2 * 2 * 64 * (32 * 9 + 64 * 9 + 32)
    assert spent.macs == first + stage1 + stage2 + stage3 + 64 * 5
    assert spent.parameters == sum(p.numel() for p in model.parameters()) and spent.seconds > 0


def test_each_regulariser_is_on_alone_and_once_per_seed() -> None:
    trials = regulariser_trials("resnet20", TrainingConfig(seed=5))
    settings = {label.rpartition(",")[0]: trial.config for label, trial in ((t.label, t) for t in trials)}
    assert len(trials) == REGULARISER_SEEDS * len(settings) and {t.config.seed for t in trials} == {5, 6, 7}
    names = ("optimizer", "label_smoothing", "l1", "l2", "dropout", "augment")
    none = replace(settings.pop("none"), seed=0)
    assert none == replace(TrainingConfig(), label_smoothing=0.0, augment=())
    assert replace(settings.pop("default"), seed=0) == TrainingConfig()
    for label, config in settings.items():
        changed = [name for name in names if getattr(config, name) != getattr(none, name)]
        assert len(changed) == 1 + (label == "L2 decoupled"), (label, changed)


def test_the_report_of_plain_against_residual_says_what_was_measured(digits: Data) -> None:
    depths = (20, 32, 56)
    plain = [outcome(f"plain{d}", 0.5, loss=2.0, first=300.0) for d in depths]
    residual = [outcome(f"resnet{d}", 0.75, loss=0.25, first=2.0) for d in depths]
    report = compare_report([*plain, *residual], *digits)
    assert "56 layers, in the same budget: test top-1 50.00 % plain, 75.00 % residual" in report.findings[2]
    assert "plain56 the norm of the gradient is 300" in report.findings[3]
    assert "600 times the smallest" in report.findings[3] and "4 times the smallest" in report.findings[4]
    assert report.picture.startswith(PNG) and len(report.rows) == 6
    page = report.markdown("picture.png", ["made by hand"])
    assert page.startswith("# Plain against residual") and "![" in page and "| plain20 | 2.000 | 50.00 |" in page


def test_the_report_of_depths_recommends(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timer, "blocked_autorange", lambda timer, **_: timer.timeit(1))  # no second for each
    report = depths_report([outcome("resnet8", 0.5), outcome("resnet14", 0.95)], *digits)
    assert report.findings[0].startswith("Recommended: resnet14") and report.picture.startswith(PNG)
    assert report.rows[0][0] == "resnet8" and report.rows[0][3] == "1.00"


def test_the_report_of_regularisers_says_what_is_beyond_chance(digits: Data) -> None:
    outcomes = [outcome("resnet8", 0.5, f"none, seed {i}") for i in range(3)]
    outcomes += [outcome("resnet8", 0.52, f"L1, seed {i}") for i in range(3)]
    outcomes += [outcome("resnet8", 0.95, f"crop, seed {i}") for i in range(3)]
    report = regularisers_report(outcomes, *digits)
    assert report.findings[1].endswith("apart from none: crop.") and report.picture.startswith(PNG)


def test_a_trial_goes_on_where_it_stopped(digits: Data, tmp_path: Path) -> None:
    trial = Trial("resnet8", "resnet8", TrainingConfig(epochs=2, batch_size=10, warmup_epochs=0))
    ran: list[Epoch] = []

    def run(resume: bool) -> Outcome:
        return run_trial(
            trial, *digits, tmp_path, device="cpu", resume=resume,
            on_step=lambda *_: None, on_epoch=ran.append,
        )  # fmt: skip

    first = run(resume=True)  # where there is nothing yet it begins
    assert len(ran) == 2 and run(resume=True) == first and len(ran) == 2
    assert first.gradients_start.keys() == first.gradients_end.keys() and first.gradients_start != first.gradients_end


def test_every_experiment_can_be_asked_for() -> None:
    for experiment in EXPERIMENTS.values():
        trials = experiment.trials("resnet8", TrainingConfig())
        assert len({trial.label for trial in trials}) == len(trials)
