import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet.models import MODELS, create_model

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnet8": 78_042,
    "resnet14": 175_258,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet44": 661_338,
    "resnet56": 855_770,
    "resnet110": 1_730_714,
    "plain8": 75_290,
    "plain14": 172_506,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain110": 1_727_962,
}


def test_every_model_has_a_known_parameter_count():
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def published_keys(depths, convolutions, projected_stages):
    """The names in a published checkpoint, in order: the rule behind them, written without the code."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            for i in range(1, convolutions + 1):
                keys += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{n}" for n in norm)]
            if block == 0 and stage in projected_stages:
                keys += [f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{n}" for n in norm)]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", ((2, 2, 2, 2), 2, {2, 3, 4})),
        ("resnet50", ((3, 4, 6, 3), 3, {1, 2, 3, 4})),
        ("resnext101_32x8d", ((3, 4, 23, 3), 3, {1, 2, 3, 4})),
        ("resnet20", ((3, 3, 3), 2, {2, 3})),
        ("plain20", ((3, 3, 3), 2, {})),
    ],
    ids=["resnet18", "resnet50", "resnext101_32x8d", "resnet20", "plain20"],
)
def test_state_dict_keys(name, layout):
    with torch.device("meta"):
        assert list(create_model(name).state_dict()) == published_keys(*layout)


def test_published_shapes_of_resnet50():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in create_model("resnet50").state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.conv1.weight"] == (128, 256, 1, 1)
    assert shapes["layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["fc.weight"] == (1000, 2048)


def randomised(name, seed=0, **arguments):
    """A model in float64 with nothing at its default: weights, affine parameters, statistics random."""
    generator = torch.Generator().manual_seed(seed)
    model = create_model(name, **arguments).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")):
                tensor.copy_(torch.exp(0.3 * noise))
            elif tensor.dim() == 4:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.3 * noise)
    return model


def restated(state: dict[str, Tensor], x: Tensor, groups: int = 1) -> Tensor:
    """The forward pass written out again from the state dict alone, with BatchNorm as its formula."""

    def conv_norm(x, conv, norm, **arguments):
        x = F.conv2d(x, state[f"{conv}.weight"], **arguments)
        mean, var, gamma, beta = (
            state[f"{norm}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    large = state["conv1.weight"].shape[-1] == 7
    x = conv_norm(x, "conv1", "bn1", stride=2 if large else 1, padding=3 if large else 1).clamp(min=0)
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    shortcuts = any("downsample" in key for key in state)
    blocks = dict.fromkeys(tuple(key.split(".")[:2]) for key in state if key.startswith("layer"))
    for stage, index in blocks:
        at, stride = f"{stage}.{index}", 2 if stage != "layer1" and index == "0" else 1
        if f"{at}.conv3.weight" in state:
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1").clamp(min=0)
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2", stride=stride, padding=1, groups=groups).clamp(min=0)
            y = conv_norm(y, f"{at}.conv3", f"{at}.bn3")
        else:
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1", stride=stride, padding=1).clamp(min=0)
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2", padding=1)
        if f"{at}.downsample.0.weight" in state:
            x = conv_norm(x, f"{at}.downsample.0", f"{at}.downsample.1", stride=stride)
        x = (x + y if shortcuts else y).clamp(min=0)
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    ("name", "size", "groups"),
    [
        pytest.param("resnet18", (65, 50), 1, id="basic-odd-size"),
        pytest.param("resnet50", (64, 64), 1, id="bottleneck"),
        pytest.param("resnext50_32x4d", (64, 64), 32, id="grouped"),
        pytest.param("resnet20", (32, 32), 1, id="small"),
        pytest.param("resnet20", (19, 24), 1, id="small-odd-size"),
        pytest.param("plain20", (32, 32), 1, id="plain"),
    ],
)
def test_forward_and_gradient_equal_the_formula(name, size, groups):
    model = randomised(name)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = model(ours), restated(model.state_dict(), theirs, groups)
    assert y.std() > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))
    y.square().sum().backward()
    expected.square().sum().backward()
    scale = float(theirs.grad.abs().max())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "plain20"])
def test_every_parameter_gets_a_gradient(name):
    model = create_model(name, num_classes=5).train()
    size = 64 if MODELS[name].image_size == 224 else 16
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize(
    ("name", "block", "first", "second"),
    [("resnet18", "layer2.0", (2, 2), (1, 1)), ("resnet50", "layer2.0", (1, 1), (2, 2))],
    ids=["basic", "bottleneck"],
)
def test_where_the_stride_sits(name, block, first, second):
    with torch.device("meta"):
        module = create_model(name).get_submodule(block)
    assert (module.conv1.stride, module.conv2.stride) == (first, second)
    assert module.downsample[0].stride == (2, 2)


def test_one_relu_module_per_block():
    with torch.device("meta"):
        model = create_model("resnet50")
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 1 + 16


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("resnet18", 1000, 224), ("resnet110", 10, 32), ("plain56", 10, 32)]
)
def test_defaults_of_the_family(name, classes, size):
    with torch.device("meta"):
        model = create_model(name)
        y = model(torch.empty(2, 3, size, size))
    assert MODELS[name].name == name
    assert MODELS[name].image_size == size
    assert y.shape == (2, classes)


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_any_class_count_and_input_channels(name):
    with torch.device("meta"):
        y = create_model(name, num_classes=7, in_channels=1)(torch.empty(3, 1, 40, 56))
    assert y.shape == (3, 7)


@pytest.mark.parametrize(
    ("given", "near"),
    [("resnet5", "resnet50"), ("ResNet50", "resnet50"), ("wide_resnet50", "wide_resnet50_2")],
)
def test_unknown_name_suggests_the_nearest(given, near):
    with pytest.raises(ValueError, match=rf"unknown model '{given}'.*\b{near}\b") as error:
        create_model(given)
    assert len(str(error.value)) < 100


def test_name_near_nothing_lists_all():
    with pytest.raises(ValueError, match="unknown model 'vit'") as error:
        create_model("vit")
    assert all(name in str(error.value) for name in MODELS)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "10"], ids=repr)
@pytest.mark.parametrize("what", ["num_classes", "in_channels"])
def test_bad_counts_are_refused(what, value):
    with pytest.raises(ValueError, match=rf"{what} must be a whole number of at least 1, got {value!r}"):
        create_model("resnet20", **{what: value})
