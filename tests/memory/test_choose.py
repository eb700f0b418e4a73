"""Which memory a run gets, and what the log says of it."""
import logging
import shutil

import pytest
import torch
from timm.data import FastCollateMixup
from torch.utils.data import DataLoader, TensorDataset

from timm_aikd import AikdConfig, AikdError
from timm_aikd.memory import choose_memory

CPU = torch.device('cpu')


def loader(**options):
    return DataLoader(TensorDataset(torch.arange(12.), torch.arange(12) % 5), 4, **options)


class Adapter:
    """A loader as accelerate makes them: it passes for the class of the loader in it."""

    def __init__(self, base):
        self.base = base

    @property
    def __class__(self):
        return self.base.__class__

    def __getattr__(self, name):
        return getattr(self.base, name)

    def __iter__(self):
        return iter(self.base)


def choose(memory, batches, classes=5, why_not=None, **options):
    config = AikdConfig(teacher='none', memory=memory, **options)
    return choose_memory(config, batches, classes, False, CPU, why_not)


@pytest.mark.parametrize('asked', ['auto', 'store'])
def test_the_store_where_it_can_be(asked, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    memory = choose(asked, loader(), memory_dir=str(tmp_path), memory_topk=3)
    message, = caplog.messages
    assert memory.name == 'store' and (memory.table.samples, memory.format.topk, memory.device) == (12, 3, CPU)
    facts = 'memory store', '12 samples', '3 of 5 log-probabilities', f'{12 * (12 + 3 * 4)}B', str(tmp_path)
    assert all(fact in message for fact in facts) and 'not store' not in message


def test_a_snapshot_that_was_asked_for_needs_no_reason(caplog):
    caplog.set_level(logging.INFO)
    assert choose('snapshot', loader()).name == 'snapshot' and not caplog.messages


@pytest.mark.parametrize('make, options, reason', [
    (lambda: None, {}, 'no data loader'),
    (lambda: Adapter(loader()), {}, 'a Adapter hides the DataLoader'),
    (lambda: loader(collate_fn=FastCollateMixup(1., num_classes=5)), {}, 'mixup'),
    (loader, {'why_not': 'the batches are secret'}, 'the batches are secret'),
    (loader, {'memory_dir': '/nowhere'}, '/nowhere cannot hold the prediction table of 12 samples'),
])
def test_auto_says_why_it_takes_the_snapshot_and_store_is_refused(make, options, reason, caplog):
    caplog.set_level(logging.INFO)
    assert choose('auto', make(), **options).name == 'snapshot'
    message, = caplog.messages
    assert 'memory snapshot, which costs a forward a step; not store, because' in message and reason in message
    with pytest.raises(AikdError, match=f'`memory` store: .*{reason}.*; use `memory` snapshot'):
        choose('store', make(), **options)


def test_a_full_disk_takes_no_space_from_the_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 10}))
    assert choose('auto', loader(), memory_dir=str(tmp_path)).name == 'snapshot' and not list(tmp_path.iterdir())


@pytest.mark.parametrize('memory', ['auto', 'store', 'snapshot'])
def test_more_predictions_than_classes_are_refused(memory):
    with pytest.raises(AikdError, match='`memory_topk` 6: allowed is 1 to the number of classes, 5'):
        choose(memory, loader(), memory_topk=6)


def test_the_loader_that_was_chosen_for_is_followed_without_being_given_again():
    batches = loader(shuffle=True)
    memory = choose('store', batches)
    memory.begin_epoch(0)
    for input, target in batches:
        memory.record(None, input[:, None].repeat(1, 5), target)
    memory.end_epoch()
    assert memory.table.records['label'].tolist() == [i % 5 for i in range(12)]


def test_an_adapter_is_recognised_by_what_it_hides():
    adapter = Adapter(loader())
    assert isinstance(adapter, DataLoader)
    with pytest.raises(AttributeError):
        adapter.__class__ = Adapter
