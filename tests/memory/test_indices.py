"""Indices of batches, proved by a dataset whose images are their indices."""
from inspect import signature

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_aikd import AikdError
from timm_aikd.memory.indices import BatchIndices, why_not_indexable

from ..support.distributed import spawn


class IndexImages(Dataset):
    """Image i is of brightness i."""

    transform = None

    def __init__(self, length=23):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = Image.new('RGB', (8, 8), (index,) * 3)
        return image if self.transform is None else self.transform(image), index % 5


def loader(length=23, batch_size=4, **options):
    settings = dict(
        is_training=True, no_aug=True, mean=(0., 0., 0.), std=(1 / 255,) * 3, device=torch.device('cpu'),
        num_workers=0, persistent_workers=False)
    return create_loader(IndexImages(length), (3, 8, 8), batch_size, **{**settings, **options})


def skip_if_started_early(batches):
    """Older versions of timm start a multi-epochs loader when they make it: told, and left to the snapshot."""
    reason = why_not_indexable(batches)
    if reason is not None:
        assert 'the MultiEpochsDataLoader has already started' in reason
        pytest.skip(f'timm {timm.__version__}: {reason}')


def seen(batches, indices, stop=None):
    """Go through an epoch, checking each batch's indices against its images; the indices in order."""
    order = []
    for step, (input, _) in enumerate(batches):
        images = input[:, 0, 0, 0].round().long().numpy()
        np.testing.assert_array_equal(indices.of_batch(len(input)), images)
        order += images.tolist()
        if step == stop:
            break
    return order


@pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')
@pytest.mark.parametrize('prefetcher', [False, True], ids=['bare', 'prefetcher'])
@pytest.mark.parametrize('multi_epochs', [False, True], ids=['epochs', 'multi-epochs'])
@pytest.mark.parametrize('workers, persistent', [(0, False), (1, False), (2, True), (4, True), (4, False)])
def test_indices_are_those_of_the_images(workers, persistent, multi_epochs, prefetcher):
    batches = loader(
        num_workers=workers, persistent_workers=persistent, use_multi_epochs_loader=multi_epochs,
        use_prefetcher=prefetcher)
    skip_if_started_early(batches)
    validation = loader(7, is_training=False, use_prefetcher=prefetcher)
    indices = BatchIndices(batches)
    orders = [seen(batches, indices)]
    assert len(list(validation)) == 2
    seen(batches, indices, stop=1)  # a break in the middle
    with pytest.raises(ZeroDivisionError):
        for _ in batches:
            raise ZeroDivisionError  # an exception before the first step
    orders += [seen(batches, indices) for _ in range(2)]
    assert all(len(set(order)) == 20 for order in orders if not multi_epochs)  # drop_last
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.skipif('input_size_choices' not in signature(create_loader).parameters, reason='timm before 1.0.31')
def test_scheduled_image_sizes():
    batches = loader(input_size_choices=[8, 16], batch_size_choices=[4, 3], num_workers=2)
    indices = BatchIndices(batches)
    assert batches.batch_sampler.average_batch_size == 3.5  # the script asks the sampler
    batches.batch_sampler.set_epoch(1)
    assert sum(len(seen(batches, indices)) for _ in range(2)) > 30


def _rank_sees(rank, repeats):
    batches = loader(256, batch_size=32, distributed=True, num_aug_repeats=repeats, num_workers=1)
    indices, orders = BatchIndices(batches), []
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        orders.append(seen(batches, indices))
    return orders


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('repeats', [0, 3])
def test_distributed_samplers(repeats):
    first, second = spawn(_rank_sees, 2, repeats)
    assert first[0] != first[1] and first[0] != second[0]
    together = sorted(first[0] + second[0])
    assert (together == list(range(256))) == (repeats == 0) and len(together) > 200


def test_a_second_iteration_at_once_is_refused():
    batches = loader(use_prefetcher=False)
    BatchIndices(batches)
    with pytest.raises(AikdError, match='twice at once'):
        for _ in batches:
            next(iter(batches))


def test_a_batch_of_another_loader_is_refused():
    batches = loader()
    indices = BatchIndices(batches)
    with pytest.raises(AikdError, match='none'):
        indices.of_batch(4)
    for _ in batches:
        with pytest.raises(AikdError, match='batch of 3 samples'):
            indices.of_batch(3)
    with pytest.raises(AikdError, match='none'):
        indices.of_batch(4)


def test_a_step_may_skip_a_batch_or_take_it_twice():
    batches = loader()
    indices = BatchIndices(batches)
    for step, (input, _) in enumerate(batches):
        for _ in range(step % 3):
            assert indices.of_batch(4).tolist() == input[:, 0, 0, 0].tolist()


def test_watching_again_starts_from_the_same_sampler():
    batches = loader(num_workers=1, persistent_workers=True)
    first = BatchIndices(batches)
    seen(batches, first)
    second = BatchIndices(batches)
    seen(batches, second)
    assert type(batches).__mro__.count(PrefetchLoader) == 1 and isinstance(batches, PrefetchLoader)


class FailsOnce(IndexImages):
    failed = False

    def __getitem__(self, index):
        if index == 5 and not FailsOnce.failed:
            FailsOnce.failed = True
            raise RuntimeError('a worker fails')
        return super().__getitem__(index)


def test_a_failing_sample_does_not_shift_a_multi_epochs_loader():
    FailsOnce.failed = False
    dataset = FailsOnce()
    batches = create_loader(
        dataset, (3, 8, 8), 4, is_training=True, no_aug=True, mean=(0., 0., 0.), std=(1 / 255,) * 3, num_workers=0,
        device=torch.device('cpu'), use_multi_epochs_loader=True, persistent_workers=False)
    skip_if_started_early(batches)
    indices = BatchIndices(batches)
    with pytest.raises(RuntimeError, match='a worker fails'):
        for _ in range(2):
            seen(batches, indices)
    for _ in range(2):
        seen(batches, indices)


def test_watching_moves_no_random_stream():
    batches = loader()
    state = torch.get_rng_state()
    BatchIndices(batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    order = [input[:, 0, 0, 0].tolist() for input, _ in batches]
    torch.manual_seed(3)
    assert [input[:, 0, 0, 0].tolist() for input, _ in loader()] == order


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Unlike:
    dataset = IndexImages()


def started():
    batches = DataLoader(IndexImages(), 4, num_workers=1, persistent_workers=True, collate_fn=list)
    batches._iterator = object()
    return batches


@pytest.mark.parametrize('make, reason', [
    (lambda: None, 'no data loader'),
    (Unlike, 'a Unlike is not'),
    (lambda: DataLoader(Stream()), 'Stream is an iterable data set'),
    (lambda: DataLoader(AugMixDataset(IndexImages(), num_splits=2), 4), 'augmentation splits'),
    (lambda: DataLoader(IndexImages(), 4, collate_fn=FastCollateMixup(1., num_classes=5)), 'mixup'),
    (lambda: DataLoader(IndexImages(), batch_size=None), 'no batch sampler'),
    (started, 'already started'),
    (lambda: PrefetchLoader(DataLoader(Stream()), device=torch.device('cpu')), 'iterable'),
])
def test_loaders_whose_samples_cannot_be_known(make, reason):
    batches = make()
    assert reason in why_not_indexable(batches)
    with pytest.raises(AikdError, match=reason):
        BatchIndices(batches)


@pytest.mark.skipif('in_order' not in DataLoader.__init__.__code__.co_varnames, reason='torch before 2.6')
def test_a_loader_out_of_order_is_not_indexable():
    assert 'out of order' in why_not_indexable(DataLoader(IndexImages(), 4, num_workers=1, in_order=False))


def test_a_sampler_of_names_is_refused():
    batches = DataLoader(IndexImages(), batch_sampler=[['a', 'b']], collate_fn=fast_collate)
    BatchIndices(batches)
    with pytest.raises(AikdError, match='not the position of a sample'):
        next(iter(batches))
