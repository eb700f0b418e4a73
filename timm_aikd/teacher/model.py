"""What a spec is turned into: a model of timm with its own weights, and what is known of it."""
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn as nn
from timm.models import create_model

from .checkpoint import Checkpoint


class TimmModel(nn.Module):
    """What timm gives the models that it builds, for annotations only: they share no class."""
    pretrained_cfg: dict[str, Any]
    num_classes: int


@dataclass(frozen=True)
class LoadedModel:
    """A model with its own weights, and what is known of it.

    Args:
        model: The model; the `label_names` of its `pretrained_cfg` name its first outputs, where they are known.
        name: Its spec; of a Hub model with the commit that was loaded.
        data_config: How its input was prepared in training, as `resolve_data_config` tells it; None: unknown.
        knows_normalisation: Whether mean and standard deviation in there are those of its training.
        model_args: What `create_model` needs besides the architecture and the number of classes.
        checkpoint: The file that it comes from; None for a model of timm or the Hub.
    """
    model: TimmModel
    name: str
    data_config: dict[str, Any] | None
    knows_normalisation: bool = True
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None

    @property
    def origin(self) -> str:
        """'published', 'run' for a checkpoint with training arguments, 'weights' for a file without."""
        if self.checkpoint is None:
            return 'published'
        return 'run' if self.checkpoint.arguments else 'weights'


def create(name: str, **kwargs: Any) -> TimmModel:
    """`timm.create_model`."""
    return cast(TimmModel, create_model(name, **kwargs))
