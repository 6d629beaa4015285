"""Weights from a file into a model, and back into a file."""

from resnet.weights.loading import WeightsInfo, load_weights, recognise_weights, save_weights
from resnet.weights.recognition import Recognised
from resnet.weights.refusals import WeightsError

__all__ = ["Recognised", "WeightsError", "WeightsInfo", "load_weights", "recognise_weights", "save_weights"]
