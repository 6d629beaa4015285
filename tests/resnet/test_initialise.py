"""Initialised networks: good evidence for comparisons, and dependent on nothing but model, images and seed."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from export import sample_inputs
from resnet.errors import ResNetError
from resnet.initialise import initialise
from resnet.models import MODELS, BasicBlock, Bottleneck, create_model
from tests.resnet.checks import bits, refusal

PHOTOGRAPHS = sample_inputs.photographs()


def crops(count: int, size: int, seed: int) -> Tensor:
    """Square crops of photographs, RGB; the same for the same seed."""
    return sample_inputs.crops(PHOTOGRAPHS, count, 3, (size, size), seed)


@dataclass
class Evidence:
    """What a comparison of numbers on these images could rest on, measured in float64."""

    folded_bias: list[float] = field(default_factory=list)  # largest per BatchNorm
    default_statistics: list[str] = field(default_factory=list)
    active: list[float] = field(default_factory=list)  # share of positive values per ReLU call
    branch: list[float] = field(default_factory=list)  # rms(branch) / rms(shortcut) per addition
    variation: float = 0.0  # of the logits between images, relative
    classes: int = 0  # different top-1 among the first 8 images
    margin: float = 0.0  # between the best two logits, median over the images, in standard deviations


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def gather(model: nn.Module, images: Tensor) -> Evidence:
    model, found = copy.deepcopy(model).double().requires_grad_(False), Evidence()
    shortcut: dict[nn.Module, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
            scale = module.weight / torch.sqrt(variance + module.eps)
            found.folded_bias.append(float((module.bias - mean * scale).abs().max()))
            if (mean == 0).any() or (variance == 1).any():
                found.default_statistics.append(name)
        elif isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, args, out: found.active.append(float((out > 0).double().mean())))
        elif isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            module.register_forward_pre_hook(lambda m, args: shortcut.__setitem__(m, rms(args[0])))
            if module.downsample is not None:
                module.downsample.register_forward_hook(
                    lambda _, args, out, m=module: shortcut.__setitem__(m, rms(out))
                )
            last.register_forward_hook(lambda _, args, out, m=module: found.branch.append(rms(out) / shortcut[m]))
    with torch.no_grad():
        y = model(images.double())
    found.variation = float((y - y.mean(dim=0)).norm() / y.norm())
    found.classes = len(set(y[:8].argmax(dim=1).tolist()))
    best = y.topk(2, dim=1).values
    found.margin = float(((best[:, 0] - best[:, 1]) / y.std()).median())
    return found


def weaknesses(found: Evidence) -> list[str]:
    """Why nothing could be concluded from a network with this evidence; empty if something can."""
    weak = {
        "default statistics": found.default_statistics,
        "no folded bias": min(found.folded_bias) < 1e-3,
        "ReLU nearly always on or off": not all(0.2 <= a <= 0.88 for a in found.active),
        "branch drowned by the shortcut or the other way round": not all(0.06 <= b <= 1 for b in found.branch),
        "logits hardly depend on the image": not found.variation >= 0.6,
        "fewer than 3 classes": not found.classes >= 3,
    }
    return [what for what, is_so in weak.items() if is_so]


# image sizes: small ones, which show as much in less time
SIZES = {"resnet18": 112, "resnet50": 96, "resnet152": 64, "resnext50_32x4d": 64}
SIZES |= dict.fromkeys(("resnet20", "resnet110", "plain20", "plain110"), 32)


@pytest.mark.parametrize("name", SIZES)
def test_initialised_network_is_good_evidence_on_other_images(name: str) -> None:
    model = initialise(create_model(name), crops(16, SIZES[name], seed=1))
    found = gather(model, crops(8, SIZES[name], seed=2))
    assert weaknesses(found) == []
    assert len(found.active) > 8 and len(found.branch) == sum(MODELS[name].depths) * name.startswith("resne")
    assert found.margin > 0.3 or SIZES[name] == 32


def test_fresh_network_is_not() -> None:
    found = gather(create_model("resnet18").eval(), crops(8, 96, seed=2))
    assert {"default statistics", "no folded bias", "logits hardly depend on the image"} <= set(weaknesses(found))


def test_the_usual_random_classifier_leaves_the_best_two_logits_close() -> None:
    model = create_model("resnet18")
    initialise(model, crops(16, 64, seed=1))
    with torch.no_grad():
        nn.init.normal_(model.fc.weight, generator=torch.Generator().manual_seed(0))
    assert gather(model, crops(24, 64, seed=2)).margin < 0.3


@pytest.mark.parametrize(("name", "size"), [("resnet18", 96), ("resnet20", 32), ("plain20", 32)])
def test_statistics_are_those_of_the_images(name: str, size: int) -> None:
    images, eps, model = crops(8, size, seed=1), torch.finfo(torch.float32).eps, create_model(name)
    inputs: dict[nn.Module, Tensor] = {}
    initialise(model, images)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in (*norms, model.fc):
        module.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0].double()))
    with torch.no_grad():
        y = model(images).double()
    for norm in norms:
        x = inputs[norm].transpose(0, 1).flatten(1)
        mean, square = x.mean(dim=1), x.square().mean(dim=1)
        rounding = eps * x.shape[1] ** 0.5 * square  # of a sum in float32; counting N - 1 instead of N is more
        assert ((norm.get_buffer("running_var") - x.var(dim=1, correction=0)).abs() <= rounding).all()
        assert ((norm.get_buffer("running_mean") - mean).abs() <= eps * (x.shape[1] * square).sqrt()).all()
    features = inputs[model.fc]
    products = features.abs() @ model.fc.weight.detach().double().abs().T
    rounding = eps * features.shape[1] ** 0.5 * float(products.max())
    assert float(y.mean(dim=0).abs().max()) <= rounding and abs(float(y.std()) - 1) <= rounding
    if name == "resnet18":  # variances are small enough to show a wrong eps
        assert max(norm.get_buffer("running_var").median() for norm in norms) < 0.5


def test_leaves_nothing_behind() -> None:
    model, images = create_model("resnet20").train(), crops(8, 32, seed=1)
    kept, state = images.clone(), torch.get_rng_state()
    assert initialise(model, images) is model
    assert torch.equal(images, kept) and torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in model.parameters())


@pytest.fixture(scope="module")
def reference() -> dict[str, bytes]:
    return bits(initialise(create_model("resnet20"), crops(8, 32, seed=1), seed=3))


def test_depends_on_nothing_but_its_arguments(reference: dict[str, bytes]) -> None:
    model, images, dtype = create_model("resnet20"), crops(8, 32, seed=1), torch.get_default_dtype()
    try:
        with (
            torch.random.fork_rng(),
            torch.autocast("cpu", torch.bfloat16),
            torch.inference_mode(),
            torch.device("meta"),
        ):
            torch.manual_seed(99)
            torch.set_default_dtype(torch.float64)
            initialise(model, images, seed=3)
    finally:
        torch.set_default_dtype(dtype)
    assert bits(model) == reference


def test_seeds_differ(reference: dict[str, bytes]) -> None:
    other = bits(initialise(create_model("resnet20"), crops(8, 32, seed=1), seed=4))
    assert all(other[n] != reference[n] for n in other if not n.endswith("num_batches_tracked"))


@pytest.mark.parametrize(("classes", "count"), [(1, 7), (2, 2), (5, 7), (300, 2)])
def test_any_class_count_and_few_images(classes: int, count: int) -> None:
    images = crops(count, 32, seed=1)[:, :1]
    model = initialise(create_model("resnet20", num_classes=classes, in_channels=1), images)
    with torch.no_grad():
        y = model(images)
    assert y.isfinite().all() and y.std(dim=0).min() > 0


IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
EXPECTED = "expected images [N >= 2, 3, H, W], got"
# a model and images that do not go together, and the words that must say so
UNFIT = {
    "float64": (create_model, IMAGES.double(), "expected float32, got a model in torch.float32 and images in torch.fl"),
    "one-image-no-batch": (create_model, IMAGES[0], f"{EXPECTED} [3, 32, 32]"),
    "one-image": (create_model, IMAGES[:1], f"{EXPECTED} [1, 3, 32, 32]"),
    "channels": (create_model, IMAGES[:, :1], f"{EXPECTED} [4, 1, 32, 32]"),
    "nan": (create_model, IMAGES.clone().index_fill_(0, torch.tensor(2), float("nan")), "expected finite images"),
    "inf": (create_model, IMAGES.clone().index_fill_(3, torch.tensor(7), float("inf")), "expected finite images"),
    "half": (lambda name: create_model(name).half(), IMAGES, "expected float32, got a model in torch.float16"),
    "other": (lambda name: nn.Linear(2, 2), IMAGES, "expected a ResNet or CifarResNet, got Linear"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_before_the_model_is_changed(case: str) -> None:
    make, images, expected = UNFIT[case]
    model = make("resnet20")
    before = bits(model)
    assert refusal(ResNetError, initialise, model, images).startswith(expected)
    assert bits(model) == before and model.training


def test_equal_images_are_refused() -> None:
    message = refusal(ResNetError, initialise, create_model("resnet20"), IMAGES[:1].repeat(4, 1, 1, 1))
    assert "images that differ" in message


def test_repeated_images_make_no_equal_classes() -> None:
    images = crops(3, 32, seed=1).repeat(4, 1, 1, 1)
    model = initialise(create_model("resnet20"), images)
    with torch.no_grad():
        best = model(images).topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min() > 0.05
