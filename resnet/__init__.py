"""The reference model family and its weights. Knows nothing of fusion or export."""

from resnet.initialise import initialise
from resnet.models import MODELS, ModelSpec, create_model
from resnet.weights import WeightsError, WeightsInfo, load_weights

__all__ = [
    "MODELS",
    "ModelSpec",
    "WeightsError",
    "WeightsInfo",
    "create_model",
    "initialise",
    "load_weights",
]
