"""Which of the teacher's outputs a data set's classes are."""
import logging

import pytest
from timm.data import ImageNetInfo, create_dataset

from timm_aikd import AikdError
from timm_aikd.teacher.classes import data_set_classes, match_classes

IMAGENETTE = ['n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079', 'n03394916', 'n03417042', 'n03425413',
              'n03445777', 'n03888257']
PLACES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # of these in ImageNet-1k, as torchvision's docs list them
LETTERS = dict(label_names=['a', 'b', 'c', 'd'])


@pytest.mark.parametrize('config, teacher_classes, names, columns', [
    (LETTERS, 4, ['a', 'b', 'c', 'd'], None),
    (LETTERS, 4, ['d', 'b', 'a', 'c'], [3, 1, 0, 2]),
    (LETTERS, 4, ['A', 'D'], [0, 3]),
    (dict(label_names={'0': 'x', '1': 'y', '2': 'z'}), 3, ['z', 'x'], [2, 0]),
    (dict(label_names=['n1', 'n2'], label_descriptions={'n1': 'tench, Tinca tinca', 'n2': 'cash_machine'}), 2,
     ['Cash machine', 'tinca Tinca'], [1, 0]),
    ({}, 1000, IMAGENETTE, PLACES),
    (dict(label_names=ImageNetInfo('imagenet-1k').label_names()), 1000, IMAGENETTE[::-1], PLACES[::-1]),
    ({}, 1000, ['tench', 'English_springer', 'chain saw', 'parachute'], [0, 217, 491, 701]),
    ({}, 1000, ImageNetInfo('imagenet-1k').label_names(), None),
    ({}, 21843, ['n01440764'], [ImageNetInfo('imagenet-21k-goog').label_names().index('n01440764')]),
])
def test_found_by_name(config, teacher_classes, names, columns, caplog):
    caplog.set_level(logging.INFO)
    assert match_classes('t', config, teacher_classes, len(names), names) == columns
    if columns is not None:
        said = f'{len(names)} of {teacher_classes} classes' if len(names) < teacher_classes else 'another order'
        assert said in caplog.text


@pytest.mark.parametrize('config, names', [
    ({}, ['a', 'b']), (LETTERS, None), (LETTERS, ['one', 'two', 'three', 'four']), ({}, None),
    (LETTERS, ['a', 'b', 'c']),  # fewer names than outputs: these are not the outputs' names
])
def test_equal_numbers_without_names_are_the_same_order_and_said_so(config, names, caplog):
    caplog.set_level(logging.INFO)
    classes = len(names) if names and not config else 4
    assert match_classes('t', config, classes, classes, names) is None
    assert 'the same order is assumed, and the teacher\'s top-1 will be tested' in caplog.text


def test_weights_of_a_run_keep_their_order():
    """A run on ImageNet with a --class-map of its own: the next one has the same."""
    names = ImageNetInfo('imagenet-1k').label_names()[::-1]
    assert match_classes('t', {}, 1000, 1000, names)[0] == 999
    assert match_classes('t', {}, 1000, 1000, names, origin='run') is None
    assert match_classes('t', {}, 1000, 1000, names, origin='weights') is None
    assert match_classes('t', {}, 1000, 10, IMAGENETTE, origin='weights') == PLACES
    with pytest.raises(AikdError, match='does not tell the names'):
        match_classes('t', {}, 1000, 10, IMAGENETTE, origin='run')


def test_the_first_outputs_of_a_run_without_num_classes_are_those_of_its_folders():
    columns = match_classes('t', dict(label_names=IMAGENETTE), 1000, 10, IMAGENETTE[::-1], origin='run')
    assert columns == list(range(10))[::-1]


@pytest.mark.parametrize('names', [None, list('abcdefghij')])
def test_num_classes_forgotten_is_said(names):
    with pytest.raises(AikdError) as error:
        match_classes('t', {}, 10, 1000, names, origin='run')
    assert 'has 10 classes, the student has 1000; the data set' in str(error.value)
    assert 'add --num-classes 10' in str(error.value)


@pytest.mark.parametrize('config, teacher_classes, student_classes, names, message', [
    (LETTERS, 4, 4, ['a', 'b', 'c', 'x'], "has 4 classes, the student has 4; the data set's 'x' is none of"),
    (LETTERS, 4, 2, ['a', 'x'], "has 4 classes, the student has 2; the data set's 'x' is none"),
    (LETTERS, 4, 6, list('abcdef'), "the data set's 'e' is none of the teacher's ('a', ...)"),
    (LETTERS, 4, 2, ['a', 'A'], "'a' is none"),
    ({}, 7, 2, ['a', 'b'], "the teacher does not tell the names of its classes, among which 'a' would be looked for"),
    (LETTERS, 4, 2, None, 'the data set does not tell the names of its classes'),
    ({}, 1000, 2, ['tench', 'nonsense'], 'has 1000 classes, the student has 2'),
    ({}, 1000, 2, ['tench', 'crane'], 'has 1000 classes, the student has 2'),  # a bird and a machine
])
def test_anything_else_is_refused_in_one_line(config, teacher_classes, student_classes, names, message):
    with pytest.raises(AikdError) as error:
        match_classes('t', config, teacher_classes, student_classes, names)
    text = str(error.value)
    assert message in text and text.startswith('t: ') and len(text) < 300 and '\n' not in text


def test_class_names_come_from_the_data_set(image_folder):
    dataset = create_dataset('', root=str(image_folder), split='train')
    assert data_set_classes(dataset) == ['class0', 'class1', 'class2']
    assert data_set_classes(object()) is None
