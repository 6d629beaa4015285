"""What `resnet` refuses: whoever gave it can mend it."""


class ResNetError(ValueError):
    """A model, weights, data or a setting that cannot be used. One line: what was given, what was expected."""
