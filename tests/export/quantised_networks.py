"""Small networks whose shapes quantisation has to get right, with how many layers each calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export import networks
from tests.export.quantised import Subject, quantised


class IdentityFirst(nn.Module):
    """x + f(x), the way most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(F.relu(x + self.block(x)).mean((2, 3)))


class ProjectionFirst(nn.Module):
    """The projection is the left summand: it is what takes the other as its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.project = nn.Conv2d(3, 12, 1, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.project(x) + self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class TwoReaders(nn.Module):
    """One convolution read by two, and returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        return self.left(x), self.right(x), x


class Grouped(nn.Module):
    """Groups, depthwise, dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.depthwise(F.relu(self.grouped(F.relu(self.stem(x)))))))


class Weighted(nn.Module):
    """A branch multiplied with a gate computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv(x)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.fc(F.relu(y * gate + x).mean((2, 3)))


class PoolsTheInput(nn.Module):
    """A max-pool before any layer, two in a row behind one, and a linear layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.max_pool2d(self.conv(F.max_pool2d(x, 2)), 3, 2, 1), 2)
        return self.fc(x.mean((2, 3)))


OWN: dict[type[nn.Module], int] = {
    IdentityFirst: 4,
    ProjectionFirst: 4,
    TwoReaders: 3,
    Grouped: 4,
    Weighted: 5,
    PoolsTheInput: 2,
}
OTHERS: dict[type[nn.Module], int] = {
    networks.Backbone: 13,
    networks.Casts: 2,
    networks.Detector: 5,
    networks.Doubled: 3,
    networks.Functional: 3,
    networks.Oddments: 3,
    networks.SharedConv: 5,
    networks.SqueezeExcite: 5,
    networks.TwoHeads: 3,
}


def make(network: type[nn.Module], images: Tensor) -> Subject:
    """One of them, quantised both ways."""
    torch.manual_seed(0)
    return quantised(network().eval() if network in OWN else networks.make(network, images), images)
