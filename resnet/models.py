"""The reference model family: residual networks, their wide and grouped variants, and plain twins.

Modules carry the names published checkpoints use (conv1, bn1, layer1 ... fc; in blocks conv1, bn1 ...
downsample.0, downsample.1), so such a checkpoint loads by key.

Sources: He et al. 2015, "Deep Residual Learning for Image Recognition" (resnet*, plain*); Xie et al. 2016,
"Aggregated Residual Transformations" (resnext*); Zagoruyko and Komodakis 2016, "Wide Residual Networks"
(wide_resnet*).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from resnet.errors import ResNetError


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut where the shape changes: 1x1 convolution and BatchNorm; None where it is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), 3x3 convolutions, stride on the first.

    x: [N, in_channels, H, W]; y: [N, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3, 1x1.

    The stride sits on the 3x3 convolution ("v1.5"), not on the first 1x1 as in the paper. The 3x3 has
    width = (channels * width_per_group // 64) * groups channels.
    x: [N, in_channels, H, W]; y: [N, 4 * channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        self.out_channels = 4 * channels
        width = (channels * width_per_group // 64) * groups
        self.conv1 = _conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, self.out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class PlainBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x)))))): a BasicBlock without its shortcut, shapes as there."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


# (in_channels, channels, stride) -> a block that knows its out_channels
BlockFactory = Callable[[int, int, int], BasicBlock | Bottleneck | PlainBlock]


def _stage(block: BlockFactory, in_channels: int, channels: int, depth: int, stride: int) -> tuple[nn.Sequential, int]:
    """`depth` blocks in a row, the first takes the stride; with the channels that come out of the last."""
    blocks = [block(in_channels, channels, stride)]
    while len(blocks) < depth:
        blocks.append(block(blocks[-1].out_channels, channels, 1))
    return nn.Sequential(*blocks), blocks[-1].out_channels


def _he_initialise(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out), as He et al. 2015; BatchNorm and fc keep PyTorch's defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # where there is nothing to draw
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """The four-stage family for large images: 7x7 stem, max-pool, 64-128-256-512 channels, pool, fc.

    x: [N, in_channels, H, W], normalised images; y: [N, num_classes], logits. depths: blocks per stage.
    """

    def __init__(
        self, block: BlockFactory, depths: tuple[int, ...], num_classes: int, in_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, width = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2, width = _stage(block, width, 128, depths[1], stride=2)
        self.layer3, width = _stage(block, width, 256, depths[2], stride=2)
        self.layer4, width = _stage(block, width, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        _he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


class CifarResNet(nn.Module):
    """The three-stage family for small images: 3x3 stem, no max-pool, 16-32-64 channels, pool, fc.

    The shortcut is a 1x1 convolution with BatchNorm where the shape changes (option B of He et al. 2015;
    their CIFAR networks use option A, zero padding, which has no weights) and the identity elsewhere.
    x: [N, in_channels, H, W], normalised images; y: [N, num_classes], logits. depths: blocks per stage.
    """

    def __init__(
        self, block: BlockFactory, depths: tuple[int, ...], num_classes: int, in_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, width = _stage(block, 16, 16, depths[0], stride=1)
        self.layer2, width = _stage(block, width, 32, depths[1], stride=2)
        self.layer3, width = _stage(block, width, 64, depths[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        _he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


@dataclass(frozen=True)
class ModelSpec:
    """One member of the family: how to build it, and what it expects by default.

    Attributes:
        name: its key in MODELS.
        network: ResNet or CifarResNet.
        block: factory of its blocks.
        depths: blocks per stage.
        num_classes: logits, unless asked otherwise.
        image_size: side of the square input it was designed for, in pixels.
    """

    name: str
    network: type[ResNet] | type[CifarResNet]
    block: BlockFactory
    depths: tuple[int, ...]
    num_classes: int
    image_size: int


def _imagenet(name: str, block: BlockFactory, *depths: int) -> ModelSpec:
    return ModelSpec(name, ResNet, block, depths, num_classes=1000, image_size=224)


def _cifar(name: str, block: BlockFactory, layers: int) -> ModelSpec:
    """He et al. 2015, section 4.2: 6n + 2 weighted layers, n blocks in each of three stages."""
    return ModelSpec(name, CifarResNet, block, ((layers - 2) // 6,) * 3, num_classes=10, image_size=32)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _imagenet("resnet18", BasicBlock, 2, 2, 2, 2),
        _imagenet("resnet34", BasicBlock, 3, 4, 6, 3),
        _imagenet("resnet50", Bottleneck, 3, 4, 6, 3),
        _imagenet("resnet101", Bottleneck, 3, 4, 23, 3),
        _imagenet("resnet152", Bottleneck, 3, 8, 36, 3),
        _imagenet("resnext50_32x4d", partial(Bottleneck, groups=32, width_per_group=4), 3, 4, 6, 3),
        _imagenet("resnext101_32x8d", partial(Bottleneck, groups=32, width_per_group=8), 3, 4, 23, 3),
        _imagenet("resnext101_64x4d", partial(Bottleneck, groups=64, width_per_group=4), 3, 4, 23, 3),
        _imagenet("wide_resnet50_2", partial(Bottleneck, width_per_group=128), 3, 4, 6, 3),
        _imagenet("wide_resnet101_2", partial(Bottleneck, width_per_group=128), 3, 4, 23, 3),
        *(_cifar(f"resnet{layers}", BasicBlock, layers) for layers in (8, 14, 20, 32, 44, 56, 110)),
        *(_cifar(f"plain{layers}", PlainBlock, layers) for layers in (8, 14, 20, 32, 44, 56, 110)),
    )
}


_MOST = 2**31 - 1  # of anything that has an axis


def _require_count(what: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ResNetError(f"{what} must be a whole number of at least 1, got {value!r}")
    if value > _MOST:
        raise ResNetError(f"{what} must be at most {_MOST}, got {value}")


def create_model(
    name: str, *, num_classes: int | None = None, in_channels: int = 3, dropout: float = 0.0
) -> ResNet | CifarResNet:
    """Build a member of the family by name, He-initialised from PyTorch's global generator, in training mode.

    Args:
        name: a key of MODELS.
        num_classes: logits; None means the default of the model (1000, or 10 for the small-image family).
        in_channels: channels of the input images.
        dropout: share of the classifier's inputs that training sets to 0.

    Raises:
        ResNetError: a name that is not in MODELS, with the nearest ones; a count that is not at least 1.
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=3) or MODELS
        raise ResNetError(f"unknown model {name!r}; nearest: {', '.join(nearest)}")
    spec = MODELS[name]
    if num_classes is None:
        num_classes = spec.num_classes
    _require_count("num_classes", num_classes)
    _require_count("in_channels", in_channels)
    return spec.network(spec.block, spec.depths, num_classes, in_channels, dropout)
