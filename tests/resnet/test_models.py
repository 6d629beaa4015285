"""The models: tensors as published, and forward pass and gradients against a restatement."""

import copy
import hashlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resnet.errors import ResNetError
from resnet.models import MODELS, CifarResNet, ResNet, create_model
from tests.resnet.checks import assert_equal_in_float64, refusal
from tests.resnet.restatement import restated

# sha256 of the lines "name shape" of the state dicts of timm 1.0.31 and of torchvision 0.28, which are the same
PUBLISHED_TENSORS = {
    "resnet18": "66b04efc1dfd4b80", "resnet34": "4aa3e2bbbdc5e2fd", "resnet50": "614cd53ddf849669",
    "resnet101": "593b3bde446ee903", "resnet152": "9ce3831312550858", "resnext50_32x4d": "5157aafec2a2c5e4",
    "resnext101_32x8d": "98e3cd7345111310", "resnext101_64x4d": "945d960d03b26b2a",
    "wide_resnet50_2": "bf71ae35ce444195", "wide_resnet101_2": "2f1e7d726d1251d2",
}  # fmt: skip
# what is known of those for CIFAR: by depth, the parameters of the residual and of the plain one
PARAMETERS = {
    8: (78_042, 75_290), 14: (175_258, 172_506), 20: (272_474, 269_722), 32: (466_906, 464_154),
    44: (661_338, 658_586), 56: (855_770, 853_018), 110: (1_730_714, 1_727_962),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _nothing_allocated() -> Iterator[None]:
    """Models are built without memory unless a test asks for another device."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", PUBLISHED_TENSORS)
def test_tensors_are_those_of_timm_and_torchvision(name: str) -> None:
    lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in create_model(name).state_dict().items())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == PUBLISHED_TENSORS[name]


def test_parameters_of_the_small_ones() -> None:
    found = {name: sum(p.numel() for p in create_model(name).parameters()) for name in {*MODELS} - {*PUBLISHED_TENSORS}}
    pairs = {depth: dict(zip(("resnet", "plain"), pair, strict=True)) for depth, pair in PARAMETERS.items()}
    assert found == {f"{family}{depth}": count for depth, pair in pairs.items() for family, count in pair.items()}


def randomised(name: str) -> ResNet | CifarResNet:
    """Of two blocks in the first stages and one in the others, in float64: weights, statistics, everything random."""
    generator, spec = torch.Generator("cpu").manual_seed(0), MODELS[name]
    with torch.device("cpu"):
        model = spec.network(spec.block, (2, 2, 1, 1)[: len(spec.depths)], 10, 3).double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
                weight = tensor.dim() > 1
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5 if weight else torch.exp(0.3 * noise))
    return model


def with_gradients(y: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and what it gives to the input and to each parameter."""
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return {"output": y.detach(), **dict(zip(["input", *parameters], gradients, strict=True))}


# model, size of the images, groups, whether BatchNorm computes its own statistics
FORMULAS = {
    "basic-odd-size": ("resnet18", (65, 50), 1, False),
    "bottleneck": ("resnet50", (64, 64), 1, False),
    "bottleneck-in-training": ("resnet50", (64, 64), 1, True),
    "grouped": ("resnext50_32x4d", (64, 64), 32, False),
    "small-odd-size": ("resnet20", (19, 24), 1, False),
    "small-in-training": ("resnet20", (32, 32), 1, True),
    "plain": ("plain20", (32, 32), 1, False),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_forward_gradients_and_statistics_equal_the_formula(case: str) -> None:
    name, size, groups, training = FORMULAS[case]
    model, results = randomised(name).train(training), []
    narrow = copy.deepcopy(model).float()
    generator = torch.Generator("cpu").manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64, device="cpu")
    leaves = {key: parameter.detach().clone().requires_grad_() for key, parameter in model.named_parameters()}
    state = {**{key: value.clone() for key, value in model.state_dict().items()}, **leaves}
    x = images.clone().requires_grad_()
    statistics: dict[str, Tensor] = {}
    expected = with_gradients(restated(state, x, groups, statistics if training else None), x, leaves)
    for network in (model, narrow):
        x = images.to(network.fc.weight.dtype, copy=True).requires_grad_()
        results.append(with_gradients(network(x), x, dict(network.named_parameters())))
        results[-1] |= {key: network.state_dict()[key] for key in statistics}
    assert expected["output"].std() > 1e-3 and bool(statistics) == training
    assert_equal_in_float64(results[0], expected | statistics, results[1])


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("resnet18", 1000, 224), ("resnet20", 10, 32), ("plain20", 10, 32)]
)
def test_defaults_of_the_family_and_other_counts(name: str, classes: int, size: int) -> None:
    assert (MODELS[name].name, MODELS[name].image_size) == (name, size)
    assert create_model(name)(torch.empty(2, 3, size, size)).shape == (2, classes)
    assert create_model(name, num_classes=7, in_channels=1)(torch.empty(3, 1, 40, 56)).shape == (3, 7)


NEAREST = {"resnet5": "resnet50", "ResNet50": "resnet50", "wide_resnet50": "wide_resnet50_2", "vit": "resnet110"}


@pytest.mark.parametrize("given", NEAREST)
def test_unknown_name_suggests_the_nearest_or_lists_all(given: str) -> None:
    message = refusal(ResNetError, create_model, given)
    names = message.removeprefix(f"unknown model '{given}'; nearest: ").split(", ")
    assert NEAREST[given] in names and (names == [*MODELS] if given == "vit" else len(names) <= 3)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "10"], ids=repr)
@pytest.mark.parametrize("what", ["num_classes", "in_channels"])
def test_bad_counts_are_refused(what: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{what} must be a whole number of at least 1, got {value!r}"):
        create_model("resnet20", **{what: value})  # type: ignore[arg-type]  # what is no count is refused too
