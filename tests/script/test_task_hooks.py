"""A script with tasks under AI-KD."""
import logging
import shutil
from collections import OrderedDict

import pytest
import torch.nn as nn
from timm.data import FastCollateMixup, create_loader
from timm.task import ClassificationTask

from timm_aikd import AikdError, AikdTask

from .stand_in import ImageNet3, Net, Script, args, batches, image_loader, train_one_epoch


def with_output(epoch, model, loader, optimizer, args, task=None, output_dir=None):
    return train_one_epoch(epoch, model, loader, optimizer, args, task)


def test_an_epoch_through_the_seams():
    with Script() as script:
        parsed = args(script)
        task = script.globals['ClassificationTask'](model=Net(5, 3), criterion=nn.CrossEntropyLoss(), verbose=False)
        assert isinstance(task, AikdTask) and isinstance(task, ClassificationTask) and task.aikd.epochs == 3
        columns = []
        for epoch in range(2):
            metrics = script.globals['train_one_epoch'](epoch, Net(5, 3), batches(), None, parsed, task=task)
            columns.append(list(metrics))
        assert columns[0] == columns[1] == ['loss'] + [f'aikd_{name}' for name in (
            'task', 'progressive', 'kd', 'features', 'adv', 'disc', 'disc_accuracy', 'teacher_top1', 'alpha',
            'disc_skipped')]
        assert metrics['aikd_alpha'] == pytest.approx(parsed.aikd_alpha * 2 / 3) and task.aikd.epoch == 1
        evaluated = script.globals['validate'](task.trainable_module, batches(), nn.CrossEntropyLoss(), parsed)
        assert list(evaluated) == ['loss', 'ece', 'aurc']


def test_the_store_is_chosen_when_the_task_is_built_and_saved_with_the_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Script(train_one_epoch=with_output) as script:
        parsed = args(script, '--aikd-memory-dir', str(tmp_path))
        loader = image_loader(script)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        assert all(fact in caplog.text for fact in ('memory store', '24 samples', '3 of 3', '432', str(tmp_path)))
        for epoch in range(2):
            metrics = script.globals['train_one_epoch'](
                epoch, None, loader, None, parsed, task=task, output_dir=tmp_path)
        # the same weights in both epochs
        assert metrics['aikd_progressive'] == pytest.approx(0, abs=1e-5) and len(task.aikd.memory.table) == 24
        assert (tmp_path / 'aikd-memory-1.safetensors').is_file()
        assert task.get_task_state()['aikd']['memory']['epoch'] == 1


def test_mixup_outside_the_loader_takes_the_snapshot_once(caplog):
    """Without the prefetcher the loader shows no mixup; the arguments do."""
    caplog.set_level(logging.INFO)
    with Script() as script:
        parsed = args(script, '--mixup', '0.4')
        loader = image_loader(script)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        script.globals['train_one_epoch'](0, None, loader, None, parsed, task=task)
        assert task.aikd.memory.name == 'snapshot' and caplog.text.count('memory s') == 2  # chosen, and the terms


def test_the_store_without_the_create_loader_seam(caplog):
    caplog.set_level(logging.INFO)
    with Script(create_loader=None) as script:
        parsed = args(script, '--aikd-memory', 'store')
        loader = image_loader(script=type('Plain', (), {'globals': {'create_loader': create_loader}}))
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        script.globals['train_one_epoch'](0, None, loader, None, parsed, task=task)
        assert task.aikd.memory.name == 'store' and '`checkpoint_folder`' in caplog.text


@pytest.mark.parametrize('words, options, facts', [
    (['--mixup', '0.4'], {}, ['--mixup 0.4']),
    ([], {'collate_fn': FastCollateMixup(1., num_classes=3)}, ['mixup or cutmix']),
    (['--aikd-memory-dir', 'full'], {}, ['full', '24 samples', '432']),
])
def test_auto_says_why_it_takes_the_snapshot_and_store_stops(words, options, facts, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'full').mkdir()
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 0}))
    with Script() as script:
        args(script, *words)
        image_loader(script, **options)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        assert task.aikd.memory.name == 'snapshot'
        assert 'memory snapshot' in caplog.text and all(fact in caplog.text for fact in facts)
        if '--mixup' not in words:  # the parser refuses that
            args(script, *words, '--aikd-memory', 'store')
            image_loader(script, **options)
            with pytest.raises(AikdError, match='`memory` store') as caught:
                script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
            assert all(fact in str(caught.value) for fact in [*facts, '`memory` snapshot'])


def test_topk_above_the_classes_is_refused_when_the_task_is_built():
    with Script() as script:
        args(script, '--aikd-memory-topk', '4')
        image_loader(script)
        with pytest.raises(AikdError, match='`memory_topk` 4: .* 3'):
            script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())


@pytest.mark.parametrize('total, epochs', [(10, 5), (None, 3)])
def test_scheduled_epochs_are_what_the_script_says(total, epochs):
    def train(epoch, model, loader, optimizer, args, task=None, num_updates_total=None):
        return train_one_epoch(epoch, model, loader, optimizer, args, task)

    with Script(train_one_epoch=train) as script:
        parsed = args(script)
        parsed.grad_accum_steps = 2
        task = script.globals['ClassificationTask'](Net(5, 3), nn.CrossEntropyLoss(), verbose=False)
        script.globals['train_one_epoch'](
            0, None, batches(3), None, parsed, task=task, num_updates_total=total)  # 2 updates an epoch
        assert task.aikd.epochs == epochs


def test_a_script_that_trains_without_its_task_is_an_error():
    with Script() as script:
        parsed = args(script)
        with pytest.raises(AikdError, match='without the task'):
            script.globals['train_one_epoch'](0, None, batches(), None, parsed, task=None)
    with Script(train_one_epoch=lambda epoch, model, loader, optimizer, args, task=None: OrderedDict()) as script:
        parsed = args(script)
        task = script.globals['ClassificationTask'](Net(5, 3), nn.CrossEntropyLoss(), verbose=False)
        with pytest.raises(AikdError, match='without one AI-KD step'):
            script.globals['train_one_epoch'](0, None, batches(), None, parsed, task=task)
