"""Seeded weights for an untrained network whose numbers look like a trained one's.

A freshly constructed network is poor evidence in a numerical comparison: default BatchNorm statistics fold to
zero biases, and its logits hardly depend on the image. `initialise` gives every BatchNorm the statistics of
real images, keeps the network from amplifying rounding errors, and makes the classifier respond to the image.
"""

import math

import torch
from torch import Tensor, nn

from resnet.errors import ResNetError
from resnet.models import BasicBlock, Bottleneck, CifarResNet, PlainBlock, ResNet

# Convolutions start at a quarter of He's standard deviation. BatchNorm divides the scale out again, but the
# running variances come to lie near 0.1, as in trained networks, where a wrong eps can be seen.
_CONV_GAIN = 0.25

# Size of what a block adds to what passes through it. Random blocks amplify rounding errors from layer to
# layer: with 0.2, resnet152 in bfloat16 loses 16 % of the variation of its features, with 0.1 it is 6 %.
_RESIDUAL_GAIN = 0.1
_PLAIN_GAIN = 0.2

# BatchNorm: gamma = gain * exp(0.2 n), beta = gain * (shift + 0.3 n), n standard normal.
_GAMMA_SPREAD = 0.2
_BETA_SPREAD = 0.3
_SHIFT = 0.5  # before a ReLU: about 70 % of the values pass, and errors grow less than at 50 %
_RESIDUAL_SHIFT = -0.4  # end of a residual branch: relu(x + branch) would drift upwards with depth

# Classes whose weights are an image's features, and the length of every other class's weights beside them.
# Fewer prototypes are farther apart; with six, 8 images still fall into three or more classes 19 times in 20.
_PROTOTYPES = 6
_MIXTURE_LENGTH = 0.3


def initialise(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Draw all weights of `model` from `seed`, calibrate its BatchNorm on `images`, and put it in eval mode.

    Convolutions: a quarter of N(0, 2 / fan_in), He et al. 2015; in blocks without a shortcut a quarter of the
    identity plus a fifth of that, after Zagoruyko and Komodakis 2017, "DiracNets". BatchNorm: gamma and beta
    from the seed; mean_c = E[x_c] and var_c = E[(x_c - mean_c)^2] over the images at the layer's input, all
    layers before it already calibrated. Classifier: see `_classifier`; the logits have zero mean over the
    images for each class, and standard deviation 1.

    Args:
        model: a ResNet or CifarResNet in float32, changed in place and returned.
        images: float32 [N, C, H, W], N >= 2, on the model's device, normalised; 8 real photographs or more.
        seed: the result depends on model, images and seed alone, not on PyTorch's global generator or modes.

    Raises:
        ResNetError: another kind of model, or images of another form, before the model is changed; images that
            the network cannot tell apart.
    """
    if not isinstance(model, ResNet | CifarResNet):
        raise ResNetError(f"expected a ResNet or CifarResNet, got {type(model).__name__}")
    _check_images(model, images)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(_CONV_GAIN * _he_normal(module, generator))
            elif isinstance(module, nn.BatchNorm2d):
                _draw_affine(module, 1.0, _SHIFT, generator)
        for module in model.modules():
            _adapt_block(module, generator)
        features = _calibrate(model.eval(), images)
        weight, bias = _classifier(features.cpu(), model.fc.out_features, generator)
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(bias)
    return model


def _check_images(model: ResNet | CifarResNet, images: Tensor) -> None:
    channels, dtype = model.conv1.in_channels, model.conv1.weight.dtype
    if dtype != torch.float32 or images.dtype != torch.float32:
        raise ResNetError(f"expected float32, got a model in {dtype} and images in {images.dtype}")
    if images.dim() != 4 or images.shape[0] < 2 or images.shape[1] != channels:
        raise ResNetError(f"expected images [N >= 2, {channels}, H, W], got {list(images.shape)}")
    if not images.isfinite().all():
        raise ResNetError("expected finite images, got NaN or Inf")


def _normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _he_normal(conv: nn.Conv2d, generator: torch.Generator) -> Tensor:
    fan_in = conv.weight[0].numel()
    return _normal(conv.weight.shape, generator) * math.sqrt(2 / fan_in)


def _draw_affine(norm: nn.BatchNorm2d, gain: float, shift: float, generator: torch.Generator) -> None:
    norm.weight.copy_(gain * torch.exp(_GAMMA_SPREAD * _normal(norm.weight.shape, generator)))
    norm.bias.copy_(gain * (shift + _BETA_SPREAD * _normal(norm.bias.shape, generator)))


def _adapt_block(block: nn.Module, generator: torch.Generator) -> None:
    """Keep the signal through a block: a small residual branch, or convolutions near the identity."""
    if isinstance(block, BasicBlock | Bottleneck):
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        _draw_affine(last, _RESIDUAL_GAIN, _RESIDUAL_SHIFT, generator)
        if block.downsample is not None:
            projection_norm = block.downsample[1]
            assert isinstance(projection_norm, nn.BatchNorm2d)
            _draw_affine(projection_norm, 1.0, 0.0, generator)
    elif isinstance(block, PlainBlock):
        for conv in (block.conv1, block.conv2):
            identity = nn.init.dirac_(torch.empty_like(conv.weight))
            conv.weight.mul_(_PLAIN_GAIN).add_(_CONV_GAIN * identity)


def _calibrate(model: ResNet | CifarResNet, images: Tensor) -> Tensor:
    """One pass over `images`; every BatchNorm takes the statistics of its input before it is applied.

    Returns the input of the classifier, float32 [N, F].
    """
    features: list[Tensor] = []

    def take_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None
        var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.fill_(1)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    hooks.append(model.fc.register_forward_pre_hook(lambda _, args: features.append(args[0])))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return features[0]


def _classifier(features: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight [classes, F] and bias [classes] of a nearest-prototype classifier, from features [N, F].

    With d the features less their mean over the images: a few classes, at random places, have as weights d of
    one image each, at length 1; the images are chosen far apart. All other classes are random mixtures of the
    images' d at length 0.3. Random rows alone leave the two best of many classes so close that rounding
    decides between them; prototypes are as far apart as the images are.
    """
    mean = features.mean(dim=0)
    deviations = features - mean
    if not deviations.norm() > 1e-4 * features.norm():
        raise ResNetError("expected images that differ from each other, got the same features for all of them")
    chosen = _far_apart(deviations, min(_PROTOTYPES, classes))
    mixtures = _normal((classes, len(features)), generator) @ deviations
    weight = _MIXTURE_LENGTH * nn.functional.normalize(mixtures)
    places = torch.randperm(classes, generator=generator, device="cpu")[: len(chosen)]
    weight[places] = nn.functional.normalize(deviations[chosen])
    weight /= (deviations @ weight.T).std()
    return weight, -(weight @ mean)


def _far_apart(points: Tensor, count: int) -> list[int]:
    """Indices of `count` of the points [N, F]: the longest, then always the one farthest from those chosen.

    Fewer than `count` when every other point coincides with a chosen one.
    """
    length = points.norm(dim=1)
    chosen = [int(length.argmax())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count and distance.max() > 1e-3 * length.max():
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return chosen
