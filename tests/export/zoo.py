"""Right networks as the field writes them, one small one of each kind. None is made to suit the product."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.sample_inputs import crops, photographs
from tests.export.networks import Called

SIZE = 32
Make = Callable[[], nn.Module]


def conv(
    c: int, out: int, k: int = 3, s: int = 1, act: Make = nn.ReLU, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution, BatchNorm and activation."""
    layer = nn.Conv2d(c, out, k, s, dilation * (k // 2), dilation, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), act())


def linear(c: int, out: int, k: int = 3, s: int = 1, groups: int = 1) -> nn.Sequential:
    """`conv` without an activation."""
    return conv(c, out, k, s, nn.Identity, groups)


def pooled(c: int, out: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, out))


def residual(branch: nn.Module, shortcut: nn.Module | None = None, act: Make = nn.ReLU) -> nn.Module:
    parts = {"branch": branch, "shortcut": shortcut or nn.Identity(), "act": act()}
    return Called(lambda x, m: m.act(m.branch(x) + m.shortcut(x)), **parts)


def net(*blocks: nn.Module, out: int = 10, c: int = 16, stem: int = 8) -> nn.Module:
    """A classifier: stem, blocks, mean, linear."""
    return nn.Sequential(conv(3, stem), *blocks, pooled(c, out))


def trunk(act: Make = nn.ReLU) -> nn.Sequential:
    """Two residual stages of 8 and 16 channels: 32x32 pictures to 16x16."""
    first = residual(nn.Sequential(conv(8, 8, act=act), linear(8, 8)), act=act)
    return nn.Sequential(conv(3, 8, act=act), first, conv(8, 16, s=2, act=act))


def of_trunk(call: Callable[[Tensor, Any], object], **parts: nn.Module | Tensor) -> nn.Module:
    """What `call` makes of the trunk's [N, 16, 16, 16]."""
    return Called(lambda x, m: call(m.trunk(x), m), trunk=trunk(), **parts)


def gated(gate: nn.Module, c: int = 8) -> nn.Module:
    """A classifier of which a residual branch is multiplied by a gate."""
    branch = Called(lambda x, m: (y := m.conv(x)) * m.gate(y), conv=linear(c, c), gate=gate)
    return net(residual(branch), conv(c, 16, s=2))


def squeeze(c: int, act: Make = nn.ReLU, gate: Make = nn.Sigmoid) -> nn.Module:
    layers = nn.Conv2d(c, 4, 1), act(), nn.Conv2d(4, c, 1), gate()
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)


def scaled(gate: nn.Module) -> nn.Module:
    return Called(lambda x, m: x * m.gate(x), gate=gate)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1 per filter, computed in forward."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, [1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Blur(nn.Module):
    """Every second pixel of what a fixed binomial filter makes of a padded map."""

    def __init__(self, c: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", (line[:, None] * line / 16).repeat(c, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filter, stride=2, groups=x.shape[1])  # type: ignore[arg-type]


class FrozenBatchNorm(nn.Module):
    """Statistics and affine as buffers, as in detectors."""

    def __init__(self, c: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.1), ("mean", 0.0), ("var", 0.3)):
            self.register_buffer(name, value + 0.2 * torch.rand(c))

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        scale = (m.weight * (m.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        y: Tensor = x * scale + (m.bias - m.mean * scale.flatten()).reshape(1, -1, 1, 1)
        return y


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def preact(norm: Callable[[int], nn.Module], layer: Callable[..., nn.Module], c: int = 8) -> nn.Module:
    """Normalisation and ReLU before each convolution; the last ones before the mean."""
    branch = nn.Sequential(norm(c), nn.ReLU(), layer(c, c, 3, padding=1), norm(c), nn.ReLU(), layer(c, c, 3, padding=1))
    block = Called(lambda x, m: m.branch(x) + x, branch=branch)
    down = nn.Sequential(norm(c), nn.ReLU(), layer(c, 16, 3, 2, 1))
    return nn.Sequential(layer(3, c, 3, padding=1), block, down, norm(16), nn.ReLU(), pooled(16))


def repvgg() -> nn.Module:
    def block(c: int, out: int, s: int) -> nn.Module:
        parts = {"a": linear(c, out, 3, s), "b": linear(c, out, 1, s)}
        if c == out and s == 1:
            return Called(lambda x, m: F.relu(m.a(x) + m.b(x) + m.c(x)), c=nn.BatchNorm2d(c), **parts)
        return Called(lambda x, m: F.relu(m.a(x) + m.b(x)), **parts)

    return nn.Sequential(block(3, 8, 1), block(8, 8, 1), block(8, 16, 2), block(16, 16, 1), pooled(16))


def iresnet() -> nn.Module:
    """ArcFace's: BatchNorm first, PReLU, BatchNorm and a linear layer behind the flattened map."""

    def block(c: int, out: int, s: int) -> nn.Module:
        last = nn.Conv2d(out, out, 3, s, 1, bias=False), nn.BatchNorm2d(out)
        first = nn.Conv2d(c, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.PReLU(out)
        shortcut = linear(c, out, 1, s) if s > 1 else None
        return residual(nn.Sequential(nn.BatchNorm2d(c), *first, *last), shortcut, nn.Identity)

    stem = conv(3, 8, act=lambda: nn.PReLU(8))
    tail = nn.BatchNorm2d(16), nn.Dropout(0.4), nn.Flatten(), nn.Linear(16 * 64, 16), nn.BatchNorm1d(16)
    return nn.Sequential(stem, block(8, 8, 2), block(8, 16, 2), *tail)


def ibn() -> nn.Module:
    """Half of the channels by the statistics of the picture, half by the batch's."""

    def call(x: Tensor, m: Any) -> Tensor:
        a, b = torch.split(x, 4, dim=1)
        return torch.cat((m.instance(a), m.batch(b)), 1)

    norm = Called(call, instance=nn.InstanceNorm2d(4, affine=True), batch=nn.BatchNorm2d(4))
    branch = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), norm, nn.ReLU(), conv(8, 8), linear(8, 8, 1))
    return net(residual(branch), conv(8, 16, s=2))


def densenet() -> nn.Module:
    def layer(c: int) -> nn.Module:
        new = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1, bias=False))
        return Called(lambda x, m: torch.cat([x, m.new(x)], 1), new=new)

    transition = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2))
    last = nn.BatchNorm2d(16), nn.ReLU(), pooled(16)
    return nn.Sequential(conv(3, 8), layer(8), layer(12), transition, layer(8), layer(12), *last)


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat([a, m.branch(b)], 1))

    branch = nn.Sequential(conv(4, 4, 1), linear(4, 4, groups=4), conv(4, 4, 1))
    return net(Called(call, branch=branch), conv(8, 16, s=2))


def inverted(act: Make, kernel: int = 3, gate: nn.Module | None = None) -> nn.Module:
    """MobileNet's block twice: with a shortcut, and with a stride."""
    middle = [gate] if gate else []
    wide = conv(8, 16, 1, act=act), conv(16, 16, kernel, act=act, groups=16)
    block = residual(nn.Sequential(*wide, *middle, linear(16, 8, 1)), act=nn.Identity)
    down = nn.Sequential(conv(8, 16, 1, act=act), conv(16, 16, kernel, 2, act, groups=16), linear(16, 16, 1))
    return nn.Sequential(conv(3, 8, act=act), block, down, conv(16, 16, 1, act=act), pooled(16))


def ghost() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        y = m.primary(x)
        return torch.cat([y, m.cheap(y)], dim=1)[:, : m.out]

    def module(c: int, out: int) -> nn.Module:
        made = Called(call, primary=conv(c, out // 2, 1), cheap=conv(out // 2, out // 2, groups=out // 2))
        made.out = out  # type: ignore[assignment]
        return made

    return net(residual(nn.Sequential(module(8, 16), module(16, 8)), act=nn.Identity), conv(8, 16, s=2))


def inception() -> nn.Module:
    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(8, 4, 1))
    branches = nn.ModuleList([conv(8, 4, 1), nn.Sequential(conv(8, 4, 1), conv(4, 4)), conv(8, 4, 5), pool])
    return net(Called(lambda x, m: torch.cat([b(x) for b in m.branches], 1), branches=branches), nn.MaxPool2d(2))


def vgg() -> nn.Module:
    def plain(c: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c, out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2))

    top = nn.Linear(16 * 16, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 10)
    return nn.Sequential(plain(3, 8), plain(8, 16), plain(16, 16), nn.AdaptiveAvgPool2d(4), nn.Flatten(), *top)


def unet() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        a = m.down1(x)
        b = m.down2(F.max_pool2d(a, 2))
        return m.mask(m.up1(torch.cat([m.up(b), a], dim=1)))

    parts = {"down1": conv(3, 8), "down2": conv(8, 16), "up": nn.ConvTranspose2d(16, 8, 2, stride=2)}
    return Called(call, **parts, up1=conv(16, 8), mask=nn.Conv2d(8, 3, 1))


def pyramid(call: Callable[[Tensor, Tensor, Any], object], **parts: nn.Module) -> nn.Module:
    """What `call` makes of two maps of 8 channels, the second of half the size."""

    def run(x: Tensor, m: Any) -> object:
        c2 = m.trunk(x)
        return call(m.lateral2(c2), m.lateral3(m.deep(c2)), m)

    laterals = {"lateral2": nn.Conv2d(16, 8, 1), "lateral3": nn.Conv2d(16, 8, 1)}
    return Called(run, trunk=trunk(), deep=conv(16, 16, s=2), **laterals, **parts)


def fpn() -> nn.Module:
    def call(fine: Tensor, coarse: Tensor, m: Any) -> dict[str, Tensor]:
        fine = fine + F.interpolate(coarse, scale_factor=2, mode="nearest")
        return {"p2": m.out2(fine), "p3": m.out3(coarse), "pool": F.max_pool2d(m.out3(coarse), 1, 2)}

    return pyramid(call, out2=nn.Conv2d(8, 8, 3, padding=1), out3=nn.Conv2d(8, 8, 3, padding=1))


def pan() -> nn.Module:
    def call(fine: Tensor, coarse: Tensor, m: Any) -> tuple[Tensor, Tensor]:
        fine = m.up(torch.cat([fine, m.upsample(coarse)], 1))
        return m.head2(fine), m.head3(m.down(torch.cat([m.reduce(fine), coarse], 1)))

    parts = {"up": conv(16, 8, act=nn.SiLU), "reduce": conv(8, 8, s=2, act=nn.SiLU), "down": conv(16, 8, act=nn.SiLU)}
    heads = {"head2": nn.Conv2d(8, 7, 1), "head3": nn.Conv2d(8, 7, 1)}
    return pyramid(call, **parts, upsample=nn.Upsample(scale_factor=2, mode="nearest"), **heads)


def ssd() -> nn.Module:
    def call(fine: Tensor, coarse: Tensor, m: Any) -> tuple[Tensor, Tensor]:
        def rows(head: nn.ModuleList, values: int) -> Tensor:
            maps = [h(y).permute(0, 2, 3, 1) for h, y in zip(head, (fine, coarse), strict=True)]
            return torch.cat([y.reshape(y.size(0), -1, values) for y in maps], 1)

        return rows(m.boxes, 4), rows(m.scores, 3)

    heads = {name: nn.ModuleList([nn.Conv2d(8, 2 * n, 3, padding=1) for _ in "ab"]) for name, n in SSD.items()}
    return pyramid(call, **heads)


SSD = {"boxes": 4, "scores": 3}


def centernet() -> nn.Module:
    def call(x: Tensor, m: Any) -> dict[str, Tensor]:
        y = m.up(x)
        return {"heat": torch.sigmoid(m.heat(y)), "size": m.size(y), "offset": m.offset(y)}

    def head(out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 1))

    up = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return of_trunk(call, up=up, heat=head(3), size=head(2), offset=head(2))


def deeplab() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        picture = F.interpolate(m.picture(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        y = m.project(torch.cat([*(branch(x) for branch in m.rates), picture], 1))
        return F.interpolate(m.classes(y), scale_factor=2, mode="bilinear", align_corners=False)

    rates = nn.ModuleList([conv(16, 8, 1), conv(16, 8, dilation=2), conv(16, 8, dilation=4)])
    picture = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(16, 8, 1))
    return of_trunk(call, rates=rates, picture=picture, project=conv(32, 8, 1), classes=nn.Conv2d(8, 5, 1))


def autoencoder() -> nn.Module:
    down = conv(3, 8, s=2), conv(8, 16, s=2), nn.Conv2d(16, 4, 1)
    up = [nn.ConvTranspose2d(c, out, 3, 2, 1, output_padding=1, bias=False) for c, out in ((4, 16), (16, 8))]
    middle = up[0], nn.BatchNorm2d(16), nn.ReLU(), up[1], nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*down, *middle, nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())


def convnext() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        y = m.scale * m.narrow(F.gelu(m.wide(y)))
        return x + y.permute(0, 3, 1, 2)

    parts = {"depthwise": nn.Conv2d(8, 8, 7, padding=3, groups=8), "norm": nn.LayerNorm(8, eps=1e-6)}
    layers: dict[str, Any] = {
        "wide": nn.Linear(8, 16),
        "narrow": nn.Linear(16, 8),
        "scale": nn.Parameter(torch.rand(8)),
    }
    stem = nn.Conv2d(3, 8, 2, 2), ChannelsFirstNorm(8, eps=1e-6)
    return nn.Sequential(
        *stem, Called(call, **parts, **layers), ChannelsFirstNorm(8), nn.Conv2d(8, 16, 2, 2), pooled(16)
    )


def darknet() -> nn.Module:
    def leaky() -> nn.Module:
        return nn.LeakyReLU(0.1, inplace=True)

    block = residual(nn.Sequential(conv(8, 4, 1, act=leaky), conv(4, 8, act=leaky)), act=nn.Identity)
    return nn.Sequential(conv(3, 8, act=leaky), block, conv(8, 16, s=2, act=leaky), pooled(16))


def split_attention() -> nn.Module:
    """ResNeSt's: two groups of channels, weighed against each other."""

    def call(x: Tensor, m: Any) -> Tensor:
        groups = m.conv(x).unflatten(1, (2, 8))
        weights = m.out(F.relu(m.fc(groups.sum(1).mean((2, 3), keepdim=True))))
        return (groups * weights.view(-1, 2, 8, 1, 1).softmax(1)).sum(1)

    parts = {"conv": conv(8, 16, groups=2), "fc": nn.Conv2d(8, 4, 1), "out": nn.Conv2d(4, 16, 1)}
    return net(residual(Called(call, **parts)), conv(8, 16, s=2))


def cbam() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        x = x * torch.sigmoid(m.mlp(F.adaptive_avg_pool2d(x, 1)) + m.mlp(F.adaptive_max_pool2d(x, 1)))
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(m.spatial(seen))

    mlp = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False))
    attention = Called(call, mlp=mlp, spatial=linear(2, 1, 7))
    return net(residual(nn.Sequential(linear(8, 8), attention)), conv(8, 16, s=2))


def eca() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        y = m.conv(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return y.sigmoid()

    return gated(Called(call, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)))


def global_context() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        n, c, h, w = x.size()
        weights = m.mask(x).view(n, 1, h * w).softmax(2)
        context = torch.matmul(x.view(n, c, h * w), weights.transpose(1, 2)).unsqueeze(-1)
        return x + m.transform(context)

    transform = nn.Sequential(nn.Conv2d(8, 4, 1), nn.LayerNorm([4, 1, 1]), nn.ReLU(), nn.Conv2d(4, 8, 1))
    block = Called(call, mask=nn.Conv2d(8, 1, 1), transform=transform)
    return net(residual(nn.Sequential(linear(8, 8), block)), conv(8, 16, s=2))


def attention_pooling() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        weights = F.softmax(m.scores(x).flatten(2), dim=-1)
        return m.fc((x.flatten(2) * weights).sum(-1))

    return of_trunk(call, scores=nn.Conv2d(16, 1, 1), fc=nn.Linear(16, 10))


def siamese() -> nn.Module:
    """Two pictures as one of 6 channels."""

    def call(x: Tensor, m: Any) -> Tensor:
        a, b = (m.trunk(half).mean((2, 3)) for half in (x[:, :3], x[:, 3:]))
        return m.fc(torch.cat([(a - b).abs(), a * b], 1))

    return Called(call, trunk=trunk(), fc=nn.Linear(32, 2))


def coordinates() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        line = torch.linspace(-1, 1, SIZE, device=x.device, dtype=x.dtype)
        maps = torch.stack(torch.meshgrid(line, line, indexing="ij"))[None].expand(x.size(0), -1, -1, -1)
        return m.rest(torch.cat([x, maps], dim=1))

    return Called(call, rest=nn.Sequential(conv(5, 8), conv(8, 16, s=2), pooled(16)))


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def flipped() -> nn.Module:
    """The mean of a picture's scores and its mirror image's."""
    call = lambda x, m: (m.net(x) + m.net(torch.flip(x, [3]))) / 2  # noqa: E731
    return Called(call, net=net(conv(8, 16, s=2)))


def option_a() -> nn.Module:
    shortcut = Called(lambda x, m: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
    return net(residual(nn.Sequential(conv(8, 16, s=2), linear(16, 16)), shortcut))


def high_resolution() -> nn.Module:
    """HRNet's exchange: each scale gets the sum of both."""

    def call(x: Tensor, m: Any) -> Tensor:
        fine, coarse = m.fine(x), m.coarse(x)
        up = F.interpolate(m.to_fine(coarse), size=fine.shape[2:], mode="bilinear", align_corners=True)
        fine, coarse = F.relu(fine + up), F.relu(coarse + m.to_coarse(fine))
        return m.fc(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))

    scales = {"fine": conv(16, 8), "coarse": conv(16, 16, s=2)}
    return of_trunk(call, **scales, to_fine=linear(16, 8, 1), to_coarse=linear(8, 16, 3, 2), fc=nn.Linear(24, 10))


def resnet_d() -> nn.Module:
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), linear(8, 16, 1))
    block = residual(nn.Sequential(conv(8, 8, 1), conv(8, 8, s=2), linear(8, 16, 1)), shortcut)
    return nn.Sequential(conv(3, 8, s=2), conv(8, 8), conv(8, 8), nn.MaxPool2d(3, 2, 1), block, pooled(16))


def frozen() -> nn.Module:
    def layer(c: int, out: int, s: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(c, out, 3, s, 1, bias=False), FrozenBatchNorm(out)]

    block = residual(nn.Sequential(*layer(8, 8), nn.ReLU(), *layer(8, 8)))
    return nn.Sequential(*layer(3, 8), nn.ReLU(), block, *layer(8, 16, 2), nn.ReLU(), pooled(16))


def basic(c: int = 8, out: int = 16, middle: nn.Module | None = None) -> nn.Module:
    first = residual(nn.Sequential(conv(c, c), middle or nn.Identity(), linear(c, c)))
    second = residual(nn.Sequential(conv(c, out, s=2), linear(out, out)), linear(c, out, 1, 2))
    return net(first, second, c=out, stem=c)


def bottleneck(width: int = 4, groups: int = 1) -> nn.Module:
    def block(c: int, s: int) -> nn.Module:
        layers = conv(c, width, 1), conv(width, width, s=s, groups=groups), linear(width, 16, 1)
        return residual(nn.Sequential(*layers), linear(c, 16, 1, s) if c != 16 else None)

    return net(nn.MaxPool2d(3, 2, 1), block(8, 2), block(16, 1))


def blurred() -> nn.Module:
    branch = nn.Sequential(conv(8, 16), Blur(16), linear(16, 16))
    return net(nn.Sequential(nn.MaxPool2d(2, 1), Blur(8)), residual(branch, nn.Sequential(Blur(8), linear(8, 16, 1))))


def reflected() -> nn.Module:
    def layer(c: int, out: int, act: Make = nn.ReLU) -> list[nn.Module]:
        return [nn.ReflectionPad2d(1), nn.Conv2d(c, out, 3, bias=False), nn.BatchNorm2d(out), act()]

    block = residual(nn.Sequential(*layer(8, 8), *layer(8, 8, nn.Identity)), act=nn.Identity)
    return nn.Sequential(*layer(3, 8), block, nn.ReflectionPad2d(1), nn.Conv2d(8, 3, 3), nn.Tanh())


def mean(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def gem(x: Tensor, m: Any) -> Tensor:
    return m.fc(F.avg_pool2d(x.clamp(min=1e-6).pow(m.p), x.shape[-2:]).pow(1.0 / m.p).flatten(1))


ZOO: dict[str, Make] = {
    "basic": basic,
    "bottleneck": bottleneck,
    "preact": lambda: preact(nn.BatchNorm2d, nn.Conv2d),
    "bit": lambda: preact(lambda c: nn.GroupNorm(4, c), Standardised),
    "resnet_d": resnet_d,
    "blur_pool": blurred,
    "squeeze_excite": lambda: gated(squeeze(8)),
    "eca": eca,
    "cbam": cbam,
    "global_context": global_context,
    "split_attention": split_attention,
    "resnext": lambda: bottleneck(8, 4),
    "wide": lambda: basic(16, 32, nn.Dropout(0.3)),
    "repvgg": repvgg,
    "iresnet": iresnet,
    "ibn": ibn,
    "densenet": densenet,
    "shufflenet": shufflenet,
    "mobilenet_v2": lambda: inverted(nn.ReLU6),
    "mobilenet_v3": lambda: inverted(nn.Hardswish, 5, scaled(squeeze(16, gate=nn.Hardsigmoid))),
    "efficientnet": lambda: inverted(nn.SiLU, 3, scaled(squeeze(16, nn.SiLU))),
    "ghostnet": ghost,
    "inception": inception,
    "vgg": vgg,
    "unet": unet,
    "fpn": fpn,
    "pan": pan,
    "ssd": ssd,
    "centernet": centernet,
    "deeplab": deeplab,
    "hrnet": high_resolution,
    "autoencoder": autoencoder,
    "convnext": convnext,
    "darknet": darknet,
    "attention_pooling": attention_pooling,
    "siamese": siamese,
    "coordconv": coordinates,
    "flip_augmented": flipped,
    "option_a": option_a,
    "reflect_padding": reflected,
    "frozen_batchnorm": frozen,
    "space_to_depth": lambda: Called(lambda x, m: m.rest(focus(x)), rest=nn.Sequential(conv(12, 16), pooled(16))),
    "landmarks": lambda: of_trunk(lambda x, m: m.fc(mean(x)), fc=nn.Linear(16, 136)),
    "embedding": lambda: of_trunk(lambda x, m: F.normalize(m.fc(mean(x))), fc=nn.Linear(16, 24)),
    "squeezed_embedding": lambda: of_trunk(lambda x, m: m.pool(m.conv(x)).squeeze(), pool=nn.AdaptiveAvgPool2d(1),
                                           conv=linear(16, 24, 1)),
    "two_classes": lambda: of_trunk(lambda x, m: m.fc(mean(x)), fc=nn.Linear(16, 2)),
    "one_logit": lambda: of_trunk(lambda x, m: m.fc(mean(x)), fc=nn.Linear(16, 1)),
    "one_logit_squeezed": lambda: of_trunk(lambda x, m: m.fc(mean(x)).squeeze(1), fc=nn.Linear(16, 1)),
    "one_probability": lambda: of_trunk(lambda x, m: torch.sigmoid(m.fc(mean(x))), fc=nn.Linear(16, 1)),
    "softmax": lambda: of_trunk(lambda x, m: m.fc(mean(x)).softmax(dim=1), fc=nn.Linear(16, 10)),
    "depth": lambda: of_trunk(lambda x, m: F.relu(m.out(m.up(x))), up=nn.Upsample(scale_factor=2, mode="bilinear"),
                              out=nn.Conv2d(16, 1, 3, padding=1)),
    "gem": lambda: of_trunk(gem, p=nn.Parameter(torch.tensor([3.0])), fc=nn.Linear(16, 10)),
    "max_and_mean": lambda: of_trunk(lambda x, m: m.fc(torch.cat([x.amax((2, 3)), mean(x)], 1)), fc=nn.Linear(32, 10)),
    "view": lambda: of_trunk(lambda x, m: m.fc(m.pool(x).view(x.size(0), -1)), pool=nn.AvgPool2d(4),
                             fc=nn.Linear(256, 10)),
    "glu": lambda: of_trunk(lambda x, m: m.fc(mean((y := m.conv(x).chunk(2, 1))[0] * torch.sigmoid(y[1]))),
                            conv=linear(16, 32), fc=nn.Linear(16, 10)),
    "multi_scale": lambda: pyramid(lambda fine, coarse, m: m.fc(mean(fine) + mean(coarse)), fc=nn.Linear(8, 10)),
}  # fmt: skip


@cache
def pictures(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    """[count, channels, 32, 32]; 6 channels are two different pictures."""
    images = crops(photographs(), count, 3, (SIZE, SIZE), seed)
    return torch.cat([images, images.roll(1, 0)], 1)[:, :channels].contiguous()


def channels_of(name: str) -> int:
    return 6 if name == "siamese" else 3


def settled(name: str) -> nn.Module:
    """One of the zoo with seeded weights, and with an affine and statistics of photographs in every BatchNorm."""
    torch.manual_seed(0)
    model = ZOO[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all that it sees
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.2)
    model.train()
    with torch.no_grad():
        for seed in range(1, 5):
            model(pictures(32, channels_of(name), seed))
    return model.eval()
