"""Class names of a run on image folders, told from its own data arguments where these files are still there."""
import os
from typing import Any

from timm.data.readers.class_map import load_class_map
from timm.utils import natural_key

from ..ranks import logger

_TRAINING = ('train', 'training')  # for timm the same split


def run_class_names(path: str, arguments: dict[str, Any]) -> list[str] | None:
    """Names by output, of its --class-map or else of its training folder; None: not to be told.

    Args:
        path: The run's checkpoint, for messages.
        arguments: Of the training script.
    """
    data = arguments.get('data_dir') or arguments.get('data')
    if not isinstance(data, str) or arguments.get('dataset'):
        return None
    root = _split_folder(data, str(arguments.get('train_split') or 'train'))
    class_map = arguments.get('class_map')
    if not class_map:
        return _folder_names(root)
    try:
        indices = load_class_map(class_map, root)
        names = {index: str(name) for name, index in indices.items()}
        return [names[index] for index in range(len(indices))]
    except Exception:  # no such file any more, or not one name for each class
        logger.warning(
            f'AI-KD: {path}: its run had --class-map {class_map}, which cannot be read here: the order of its classes '
            f'is unknown')
        return None


def _split_folder(data: str, split: str) -> str:
    """The folder that timm takes for a split: of this name, or a synonym, or the data folder itself."""
    name = split.partition('[')[0]
    for each in (name, *_TRAINING) if name in _TRAINING else (name,):
        if os.path.exists(os.path.join(data, each)):
            return os.path.join(data, each)
    return data


def _folder_names(root: str) -> list[str] | None:
    try:
        with os.scandir(root) as entries:
            return sorted((entry.name for entry in entries if entry.is_dir()), key=natural_key)
    except (OSError, ValueError):
        return None
