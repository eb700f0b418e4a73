"""The loaders that a script makes."""
import argparse
import logging
import random
import shutil

import numpy
import pytest
import torch
from timm.data import create_dataset, create_loader

from timm_aikd import AikdError
from timm_aikd.script import splits
from timm_aikd.script.splits import Splits

from ..conftest import TinyNet, write_images

# timm's readers leave their files to the garbage collector
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
ARGS = argparse.Namespace(train_split='train', val_split='validation')


def load(seen, folder, split, is_training, **options):
    dataset = create_dataset('', root=str(folder), split=split)
    return seen.create_loader(
        dataset, **{'input_size': (3, 32, 32), 'batch_size': 4, 'is_training': is_training, 'num_workers': 1,
                    'device': torch.device('cpu'), **options})


def test_calibration_images_are_spread_over_the_classes_and_move_no_stream(image_folder, monkeypatch):
    monkeypatch.setattr(splits, 'CALIBRATION_IMAGES', 9)
    seen, labels = Splits(create_loader, ARGS), []
    load(seen, image_folder, 'validation', False)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    with splits.random_streams_kept():
        for _, target in seen.calibration_batches(TinyNet()):
            labels += target.tolist()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_batch_larger_than_the_training_split(image_folder):
    seen = Splits(create_loader, ARGS)
    with pytest.raises(AikdError, match='--batch-size 37: .* 36 .*at most 36'):
        load(seen, image_folder, 'train', True, batch_size=37)
    load(seen, image_folder, 'train', True, batch_size=36)
    assert seen.class_names == ['class0', 'class1', 'class2'] and not seen.can_calibrate()


@pytest.mark.parametrize('split, change, facts', [
    ('validation', lambda x: shutil.rmtree(x / 'class0'), ["no images of class 'class0'", '--class-map']),
    ('validation', lambda x: shutil.rmtree(x / 'class1'), ["no images of class 'class1'", '--class-map']),
    ('validation', lambda x: (x / 'class0').rename(x / 'zero'), ["no images of class 'class0'", '--class-map']),
    ('validation', lambda x: shutil.copytree(x / 'class0', x / 'zero'), ["images of a class 'zero'", '--class-map']),
    ('train', lambda x: shutil.rmtree(x / 'class1'), ["images of a class 'class1'", '--class-map']),
])
def test_splits_of_different_classes_are_refused(tmp_path, split, change, facts):
    seen = Splits(create_loader, ARGS)
    change(write_images(tmp_path / 'data', per_class=4) / split)
    load(seen, tmp_path / 'data', 'train', True)
    with pytest.raises(AikdError) as caught:
        load(seen, tmp_path / 'data', 'validation', False)
    assert all(fact in str(caught.value) for fact in ('--val-split validation', '--train-split train', *facts))


def test_a_lack_that_shifts_no_label_is_a_warning(tmp_path, caplog):
    seen = Splits(create_loader, ARGS)
    shutil.rmtree(write_images(tmp_path / 'data', per_class=4) / 'validation/class2')
    load(seen, tmp_path / 'data', 'train', True)
    load(seen, tmp_path / 'data', 'validation', False)
    assert "no images of class 'class2'" in caplog.text and seen.can_calibrate()


@pytest.mark.parametrize('val_split, remove, names', [
    ('validation', 'validation', True), ('train', '', True), ('validation', '', False),
])
def test_no_temperature_is_fitted_to_training_images(tmp_path, caplog, val_split, remove, names):
    caplog.set_level(logging.WARNING)
    seen = Splits(create_loader, argparse.Namespace(train_split='train', val_split=val_split))
    data = write_images(tmp_path / 'data', per_class=4)
    if remove:
        shutil.rmtree(data / remove)
    load(seen, data, 'train', True)
    load(seen, data, val_split, False)
    assert seen.can_calibrate() is not names and seen.can_calibrate() is not names
    assert len(caplog.messages) == names and (f'--val-split {val_split}' in caplog.text) is names
