"""The classes of a plain run are told from its own data."""
import logging
import os

import pytest
import torch

from timm_aikd import load_teacher
from timm_aikd.teacher.run_classes import run_class_names

from ..support.teachers import CLASSES, batch, refused, save, source


@pytest.fixture
def data(folder):
    """Folder of a data set with a training split."""
    for name in CLASSES:
        (folder / 'data' / 'train' / name).mkdir(parents=True)
    return str(folder / 'data')


def test_names_are_those_of_the_training_folder(data):
    assert run_class_names('x', {'data_dir': data}) == list(CLASSES)
    assert run_class_names('x', {'data': data, 'train_split': 'training', 'dataset': ''}) == list(CLASSES)
    assert run_class_names('x', {'data_dir': f'{data}/train', 'train_split': 'train'}) == list(CLASSES)
    for arguments in ({'data_dir': data, 'dataset': 'torch/cifar10'}, {'data_dir': 'gone'}, {'data_dir': None}, {}):
        assert run_class_names('x', arguments) is None
    os.rename(f'{data}/train/ant', f'{data}/train/10')
    os.rename(f'{data}/train/bee', f'{data}/train/9')
    assert run_class_names('x', {'data_dir': data}) == ['9', '10', 'cat', 'dog', 'elk']  # in timm's order


def test_names_are_those_of_the_class_map(folder, data, caplog):
    swapped = ['bee', 'ant', *CLASSES[2:]]
    (folder / 'map.txt').write_text('\n'.join(swapped))
    assert run_class_names('x', {'data_dir': data, 'class_map': 'map.txt'}) == swapped
    assert caplog.messages == []
    assert run_class_names('x', {'data_dir': data, 'class_map': 'gone.txt'}) is None
    assert 'x: its run had --class-map gone.txt, which cannot be read here' in caplog.text


def test_two_classes_swapped_by_a_class_map_are_put_right(folder, data, student):
    (folder / 'map.txt').write_text('\n'.join(['bee', 'ant', *CLASSES[2:]]))
    model = source(1)
    save(model, 'x.pth.tar', data_dir=data, class_map='map.txt', num_classes=5)
    teacher = load_teacher('x.pth.tar', student, class_names=CLASSES)
    assert torch.equal(teacher(batch()), model(batch())[:, [1, 0, 2, 3, 4]])


def test_a_plain_run_on_the_same_folders_is_compared_by_name(data, student, caplog):
    model = source(1)
    save(model, 'x.pth.tar', data_dir=data, num_classes=5)
    with caplog.at_level(logging.INFO):
        assert torch.equal(load_teacher('x.pth.tar', student, class_names=CLASSES)(batch()), model(batch()))
    assert not any('order' in message for message in caplog.messages)
    refused('x.pth.tar', student, "the data set's 'fox' is none of the teacher's", class_names=['fox', *CLASSES[1:]])


def test_a_run_without_num_classes_has_its_own_folders_first(folder, student):
    """WordNet ids are no reason to take its outputs for ImageNet's."""
    names = ['n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03888257']
    for name in names:
        (folder / 'data' / 'train' / name).mkdir(parents=True)
    model = source(1, num_classes=1000)
    save(model, 'x.pth.tar', data_dir='data')
    assert torch.equal(load_teacher('x.pth.tar', student, class_names=names)(batch()), model(batch())[:, :5])
    os.rename('data', 'gone')
    refused('x.pth.tar', student, 'has 1000 classes, the student has 5', 'does not tell', class_names=names)
