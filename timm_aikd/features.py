"""The features before a model's classifier, taken from its own forward."""
from typing import Any

import torch
import torch.nn as nn

from .errors import AikdError

FEATURE_OPTIONS = '`feature_weight` or `disc_input` features'  # what needs them, for messages


class FeatureTap:
    """Keeps the input of a model's classifier at each forward, until it is taken.

    Of a model with several classifiers, as distilled ones have, it is the first one's input. Copies of the model, such
    as a moving average or a snapshot, are not tapped.

    Args:
        model: The model, without DDP or compile around it.
        name: The model's, for messages.

    Raises:
        AikdError: The model has no classifier, or none whose input has a known width.
    """

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        self._classifier = _first_classifier(model)
        width = getattr(self._classifier, 'in_features', None) or getattr(self._classifier, 'in_channels', None)
        if not isinstance(width, int):
            raise AikdError(
                f'{FEATURE_OPTIONS}: {name} ({type(model).__name__}) has no classifier layer to take the features '
                f'before; leave these options out, or use another model')
        self.width = width
        self._features: torch.Tensor | None = None
        assert self._classifier is not None
        self._classifier.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook."""
        if module is self._classifier:
            self._features = args[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> 'FeatureTap':
        """The copied module keeps this very hook, which ignores it."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_features': None}

    def take(self) -> torch.Tensor:
        """The features [B, F] of the last forward.

        Raises:
            AikdError: There was no forward, or the classifier's input is not one vector a sample.
        """
        features, self._features = self._features, None
        if features is None:
            raise AikdError(f'{FEATURE_OPTIONS}: {self.name} has not run forward, or not with its classifier')
        vectors = features.flatten(1)
        if vectors.shape[1] != self.width:
            raise AikdError(
                f'{FEATURE_OPTIONS}: the classifier of {self.name} sees {list(features.shape)}, not one vector '
                f'of {self.width} a sample; leave these options out')
        return vectors


def _first_classifier(model: nn.Module) -> nn.Module | None:
    get_classifier = getattr(model, 'get_classifier', None)
    classifier = get_classifier() if get_classifier is not None else None
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        classifier = next(iter(classifier), None)
    return classifier if isinstance(classifier, nn.Module) else None
