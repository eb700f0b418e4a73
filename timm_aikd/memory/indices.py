"""The dataset indices of a batch: what a loader's sampler draws, followed to the batch that the training loop uses.

Dataset, targets and collate function are not touched, and nothing runs in a worker: samplers run in the main process.
The batch sampler is wrapped to note the indices it draws, and each loader (torch's `DataLoader`, timm's
`PrefetchLoader` around it) to note which of these it yields. A loader neither drops nor reorders batches, so its k-th
batch is the k-th one that it was given, however many it prefetches. The batch in use is the last one that the outermost
loader has yielded. The notes of an iteration end with it, also where it is cut short.

A dataset may return another sample than it was asked for: for an unreadable file, timm's `ImageDataset` returns the
next image, whose prediction is then kept under the index of the unreadable one.
"""
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from timm.data import AugMixDataset
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, IterableDataset

from ..errors import AikdError


def why_not_indexable(loader: Any) -> str | None:
    """Why the samples of a loader's batches cannot be known, or None if they can."""
    if loader is None:
        return 'there is no data loader to watch'
    inner = loader_stages(loader)[-1]
    if not isinstance(inner, DataLoader):
        return f'a {type(inner).__name__} is not a DataLoader of torch'
    if isinstance(inner.dataset, IterableDataset):
        return f'{type(inner.dataset).__name__} is an iterable data set, whose samples have no index'
    if isinstance(inner.dataset, AugMixDataset):
        return 'augmentation splits put several views of a sample into a batch'
    if hasattr(inner.collate_fn, 'mixup_enabled'):
        return 'mixup or cutmix mixes the samples of a batch'
    if inner.batch_sampler is None:
        return 'the loader has no batch sampler'
    if not getattr(inner, 'in_order', True):
        return 'the loader yields batches out of order (in_order=False)'
    return _why_not_watchable(inner)


def _why_not_watchable(inner: Any) -> str | None:
    if type(inner) is not inner.__class__:  # accelerate's adapters
        return f'a {type(inner).__name__} hides the DataLoader in it'
    started = getattr(inner, 'iterator', None) is not None or getattr(inner, '_iterator', None) is not None
    if started and not _is_watched(inner):
        return f'the {type(inner).__name__} has already started (older versions of timm start it when they make it)'
    return None


class BatchIndices:
    """Watches a training loader and tells the dataset indices of the batch in use.

    Args:
        loader: A `DataLoader` over a map-style dataset or timm's `PrefetchLoader` around one, not yet iterated.

    Raises:
        AikdError: The samples of its batches cannot be known, see `why_not_indexable`.
    """

    def __init__(self, loader: Any):
        reason = why_not_indexable(loader)
        if reason is not None:
            raise AikdError(f'the samples of a batch cannot be known: {reason}; use `memory` snapshot')
        self.loader = loader
        *prefetchers, inner = loader_stages(loader)
        if not _is_watched(inner):
            object.__setattr__(inner, 'batch_sampler', _WatchedSampler(inner.batch_sampler))  # past DataLoader's guard
        source: _Notes = inner.batch_sampler.notes
        for stage in (inner, *reversed(prefetchers)):
            if not _is_watched(stage):
                stage.__class__ = _watched_class(type(stage))  # one base only: __class__ takes no other layout
            stage._aikd_source, stage._aikd_notes = source, _Notes(last_only=stage is loader)
            source = stage._aikd_notes
        self._notes = source

    def of_batch(self, size: int) -> np.ndarray:
        """Dataset indices [B] of the batch in use, which has `size` samples.

        Raises:
            AikdError: No batch of the loader is in use, or it is of another size.
        """
        index = self._notes.queue[-1] if self._notes.queue else None
        if index is None or len(index) != size:
            held = 'it has yielded none' if index is None else f'that one has {len(index)} samples'
            raise AikdError(
                f'`memory` store: a batch of {size} samples is not the last one of the loader given to begin_epoch '
                f'({held}): train on the batches of that loader, or use `memory` snapshot')
        return index


def loader_stages(loader: Any) -> list[Any]:
    """The loader, the loader in it, and so on down to torch's."""
    stages = [loader]
    while isinstance(stages[-1], PrefetchLoader):
        stages.append(stages[-1].loader)
    return stages


def _is_watched(loader: Any) -> bool:
    return hasattr(loader, '_aikd_notes')


class _Notes:
    """Indices of the batches that a stage has passed on and the next stage, if there is one, has not."""

    def __init__(self, last_only: bool = False):
        self.last_only = last_only
        self.queue: deque[np.ndarray] = deque()

    def renew(self) -> deque[np.ndarray]:
        self.queue = deque(maxlen=1 if self.last_only else None)
        return self.queue


class _WatchedSampler:
    """A batch sampler that notes what it draws; otherwise it behaves as the sampler in it."""

    def __init__(self, batch_sampler: Any):
        self._aikd_sampler, self.notes = batch_sampler, _Notes()

    def __iter__(self) -> Iterator[Any]:
        return self._draw(self.notes.renew())

    def _draw(self, queue: deque[np.ndarray]) -> Iterator[Any]:
        for batch in self._aikd_sampler:
            queue.append(np.fromiter(map(_position, batch), np.int64, len(batch)))
            yield batch

    def __len__(self) -> int:
        return len(self._aikd_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['_aikd_sampler'], name)


def _watched_class(loader_class: type[Iterable[Any]]) -> type[Iterable[Any]]:
    """A loader's class that also notes the indices of each batch that it yields."""

    def __iter__(self: Any) -> Iterator[Any]:
        source, notes = self._aikd_source, self._aikd_notes
        queue = notes.renew()
        try:
            for batch in loader_class.__iter__(self):
                if notes.queue is not queue:
                    raise AikdError(
                        '`memory` store: the training loader is being iterated twice at once: finish one epoch before '
                        'the next, look at samples through another loader, or use `memory` snapshot')
                queue.append(source.queue.popleft())
                yield batch
        except Exception:
            if hasattr(self, 'iterator'):
                self.iterator = None  # timm's MultiEpochsDataLoader would go on at an unknown place
            raise
        finally:
            if notes.last_only:
                queue.clear()  # no batch is in use

    return type(loader_class.__name__, (loader_class,), {'__iter__': __iter__})


def _position(item: Any) -> int:
    """A sampler's item as a position in the dataset; timm's scheduled image sizes yield (position, size) tuples."""
    try:
        return int(item[0] if isinstance(item, tuple) else item)
    except (TypeError, ValueError) as error:
        raise AikdError(
            f'`memory` store: the sampler yields {item!r}, not the position of a sample: use `memory` snapshot'
        ) from error
