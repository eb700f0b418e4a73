"""The training and the validation split, seen where the script makes loaders of them."""
import argparse
import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torch.nn as nn
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset, Subset

from ..errors import AikdError
from ..ranks import logger, world_size
from ..teacher import data_set_classes

CALIBRATION_IMAGES = 2048  # of the validation split, for the fit of T_c
TRAINING_IMAGES = 1024  # of the training split, for the verdict on the teacher

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Splits:
    """Remembers the training loader, its class names, and how the validation loader was made.

    Args:
        create_loader: The script's own.
        args: The script's arguments.
    """

    def __init__(self, create_loader: Callable[..., Any], args: argparse.Namespace):
        self._create_loader, self._args = create_loader, args
        self.train_loader: Any = None
        self.class_names: list[str] | None = None
        self._validation: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def create_loader(self, *args: Any, **kwargs: Any) -> Any:
        """The script's own loader.

        Raises:
            AikdError: The training loader has no batch, or validation labels stand for other classes.
        """
        loader = self._create_loader(*args, **kwargs)
        arguments = inspect.signature(self._create_loader).bind(*args, **kwargs).arguments
        dataset = arguments['dataset']
        if not arguments.get('is_training'):
            self._compare_classes(data_set_classes(dataset))
            self._validation = args, kwargs
            return loader
        if not len(loader):
            raise AikdError(
                f'--batch-size {arguments["batch_size"]}: each of {world_size()} processes has fewer of the '
                f'{len(dataset)} training images; at most {len(dataset) // world_size()}')
        self.train_loader, self.class_names = loader, data_set_classes(dataset)
        return loader

    def can_calibrate(self) -> bool:
        """Whether there are images that T_c can be fitted to: the teacher must not have been trained on them."""
        if self._validation is not None and self._is_training_data(self._evaluation()['dataset']):
            self._validation = None
            logger.warning(
                f'AI-KD: --val-split {self._args.val_split} gives the training images, on which the teacher is too '
                f'sure: T_c is not fitted to them; name a split or folder of other images')
        return self._validation is not None

    def calibration_batches(self, student: nn.Module) -> Batches:
        """Labelled validation images from a loader like the script's own."""
        return self._batches(self._evaluation()['dataset'], CALIBRATION_IMAGES, student)

    def training_batches(self, student: nn.Module) -> Batches | None:
        """Labelled training images, without augmentation, from a loader like that of the validation images.

        None for a data set that cannot be indexed, or that has no transform to exchange.
        """
        images = getattr(self.train_loader, 'dataset', None)
        transform = getattr(self._evaluation()['dataset'], 'transform', None)
        if images is None or transform is None or isinstance(images, IterableDataset):
            return None
        if not hasattr(images, 'transform'):
            return None
        images = copy.copy(images)  # the training goes on with its own transform
        images.transform = transform
        return self._batches(images, TRAINING_IMAGES, student)

    def _evaluation(self) -> dict[str, Any]:
        """The arguments of the validation loader."""
        assert self._validation is not None
        args, kwargs = self._validation
        return dict(inspect.signature(self._create_loader).bind(*args, **kwargs).arguments)

    def _batches(self, dataset: Any, left: int, student: nn.Module) -> Batches:
        """At least `left` images, spread evenly over the data set: many data sets are sorted by class."""
        arguments = {**self._evaluation(), 'persistent_workers': False}
        if isinstance(dataset, IterableDataset):
            left = math.ceil(left / world_size())
        elif len(dataset) > left:
            dataset = Subset(dataset, [i * len(dataset) // left for i in range(left)])
        for input, target in self._create_loader(**{**arguments, 'dataset': dataset}):
            if not arguments.get('use_prefetcher', True):
                weight = next(student.parameters())
                input, target = input.to(weight.device, weight.dtype), target.to(weight.device)
            yield input, target
            left -= len(target)
            if left <= 0:
                return

    def _compare_classes(self, names: list[str] | None) -> None:
        ours = self.class_names
        if ours is None or names is None or names == ours:
            return
        lacking, surplus = sorted(set(ours) - set(names)), sorted(set(names) - set(ours))
        what = f'no images of class {lacking[0]!r}' if lacking else f'images of a class {(surplus or names)[0]!r}'
        text = f'--val-split {self._args.val_split}: has {what}, unlike --train-split {self._args.train_split}'
        if names != ours[:len(names)]:
            raise AikdError(f'{text}: its labels stand for other classes; make the folders alike, or use --class-map')
        logger.warning(f'AI-KD: {text}')

    def _is_training_data(self, dataset: Any) -> bool:
        if getattr(self._args, 'val_split', None) == getattr(self._args, 'train_split', ''):
            return True
        ours, theirs = (getattr(data, 'reader', None) for data in (self.train_loader.dataset, dataset))
        if not isinstance(ours, ReaderImageFolder) or not isinstance(theirs, ReaderImageFolder):
            return False
        return ours.filename(0, absolute=True) in set(theirs.filenames(absolute=True))


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Leave the script's random streams where they are: a run and its baseline must see the same data."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):  # nothing random runs on a device here
        yield
    random.setstate(python)
    numpy.random.set_state(numpy_state)
