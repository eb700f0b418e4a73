"""The classes of a data set, and which of a model's outputs they are, told by their names."""
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import AikdError
from ..ranks import logger


def data_set_classes(data_set: Any) -> list[str] | None:
    """Class names by index, where a timm or torchvision data set tells them."""
    for holder in (getattr(data_set, 'reader', None), data_set):
        indices = getattr(holder, 'class_to_idx', None)
        if isinstance(indices, dict) and sorted(indices.values()) == list(range(len(indices))):
            return sorted(indices, key=indices.__getitem__)
    return None


def class_count(student: nn.Module) -> int:
    """Number of the student's classes.

    Raises:
        AikdError: It does not tell.
    """
    count: int | None = getattr(student, 'num_classes', None)
    if count is None:
        raise AikdError('AI-KD: the student has no attribute num_classes: set it to the number of its classes')
    return count


def match_classes(
        teacher: str,
        config: dict[str, Any],
        teacher_classes: int,
        student_classes: int,
        class_names: Sequence[str] | None,
        origin: str = 'published',
        student: str = 'student',
) -> list[int] | None:
    """For each of the student's classes the teacher's output; None where they are the same ones in the same order.

    The student's classes may be a part of the teacher's. They are looked for among the names in the teacher's config
    and, where it has as many classes as a subset of ImageNet, among timm's names of these: WordNet ids, and words as
    far as they name one class only. Where a side does not tell its names, or not one is common, equal numbers of
    classes are taken for the same classes in the same order.

    Args:
        teacher: What to call the teacher in messages.
        config: Its `pretrained_cfg`, whose `label_names` may name the first outputs only.
        teacher_classes: Its number of outputs.
        student_classes: The student's.
        class_names: Names of the student's classes in the order of its outputs, where they are known.
        origin: Of the teacher, see `LoadedModel`: the outputs of a 'run' are in the order of its own folders, never
            taken for ImageNet's; those of 'weights' only where there is no other way to tell.
        student: What to call the other side in messages.

    Raises:
        AikdError: Some of the student's classes are not the teacher's, or cannot be told.
    """
    ours = list(class_names or ())
    if len(ours) != student_classes:
        ours = []  # these are not the outputs' names
    names = _names(config, teacher_classes)
    may_guess = origin == 'published' or (origin == 'weights' and teacher_classes != student_classes)
    columns, common = _found(ours, _namings(config, teacher_classes, may_guess))
    if columns is not None:
        return _reordered(columns, teacher_classes, student)
    if teacher_classes == student_classes and not (names and common):
        _assume_order(ours, names, student)
        return None
    raise AikdError(
        f'{teacher}: has {teacher_classes} classes, the {student} has {student_classes}; '
        + _remedy(teacher_classes, ours, names, len(class_names or ())) + _other_use(student))


def _found(ours: list[str], namings: Iterator[dict[str, int]]) -> tuple[list[int] | None, int]:
    """The outputs of our classes by the first naming that has all of them, and how many the best naming has."""
    common = 0
    for theirs in namings if ours else ():
        columns = [theirs[name] for name in map(_plain, ours) if name in theirs]
        if len(columns) == len(set(columns)) == len(ours):
            return columns, len(columns)
        common = max(common, len(columns))
    return None, common


def _reordered(columns: list[int], teacher_classes: int, student: str) -> list[int] | None:
    if columns == list(range(teacher_classes)):
        return None
    logger.info(
        f'AI-KD: the {student} has {len(columns)} of {teacher_classes} classes of the teacher, found by name'
        if len(columns) < teacher_classes else
        'AI-KD: same classes in another order: the teacher\'s outputs are reordered by name')
    return columns


def _assume_order(ours: list[str], theirs: list[str], student: str) -> None:
    assumed = 'the same order is assumed' + (
        ', and the teacher\'s top-1 will be tested' if student == 'student' else '')
    if ours and theirs:
        logger.warning(
            f'AI-KD: teacher and data set name their classes otherwise ({theirs[0]!r}, {ours[0]!r}): {assumed}')
    else:
        logger.info(f'AI-KD: the classes of teacher and data set cannot be compared by name: {assumed}')


def _remedy(teacher_classes: int, ours: list[str], theirs: list[str], in_data: int) -> str:
    """What differs and what to do, where the data set tells the names of `in_data` classes."""
    if not ours and in_data == teacher_classes:
        return f'the data set has {teacher_classes}: add --num-classes {teacher_classes}'
    if not ours:
        return (
            f'the data set does not tell the names of its classes: if it has {teacher_classes}, add --num-classes '
            f'{teacher_classes}, else train or choose a model of its classes')
    return (
        f'{_difference(ours, theirs)}: train or choose a model of these classes, or name them as it does (folders, '
        f'--class-map)')


def _other_use(student: str) -> str:
    return '; or use features alone, see `kd_weight`' if student == 'student' else ''


def _difference(ours: list[str], theirs: list[str]) -> str:
    if not theirs:
        return f'the teacher does not tell the names of its classes, among which {ours[0]!r} would be looked for'
    odd = [name for name in ours if _plain(name) not in set(map(_plain, theirs))]
    shown = (odd or [name for name, count in Counter(ours).items() if count > 1] or ours)[0]
    return f'the data set\'s {shown!r} is none of the teacher\'s ({theirs[0]!r}, ...)'


def _names(config: dict[str, Any], classes: int) -> list[str]:
    """Class names in a teacher's config, in order; empty where it has none."""
    names = config.get('label_names') or []
    if isinstance(names, dict):
        names = [names.get(str(i), names.get(i, '')) for i in range(classes)]
    return list(names)


def _namings(config: dict[str, Any], classes: int, may_guess: bool) -> Iterator[dict[str, int]]:
    """Ways to name the teacher's classes, each a table from name to output."""
    names, words = _names(config, classes), config.get('label_descriptions') or {}
    if names:
        yield _table([[name] for name in names])
        if isinstance(words, dict):
            yield _table([str(words.get(name, '')).split(',') for name in names])
    if names or may_guess:
        yield from _imagenet_namings(names, classes)


def _imagenet_namings(names: list[str], classes: int) -> Iterator[dict[str, int]]:
    """Those of a subset of ImageNet with as many classes, if it has these names or there are none."""
    subset = infer_imagenet_subset({'num_classes': classes})
    if subset is None:
        return
    info = ImageNetInfo(subset)
    ids = info.label_names()
    if names and list(map(_plain, names)) != list(map(_plain, ids)):
        return
    yield _table([[name] for name in ids])
    yield _table([info.index_to_description(i).split(',') for i in range(classes)])


def _table(names: list[list[str]]) -> dict[str, int]:
    """Name -> output; a name that several outputs have is left out."""
    pairs = {(_plain(name), output) for output, group in enumerate(names) for name in group if name.strip()}
    count = Counter(name for name, _ in pairs)
    return {name: output for name, output in pairs if count[name] == 1}


def _plain(name: str) -> str:
    return ' '.join(str(name).lower().replace('_', ' ').split())
