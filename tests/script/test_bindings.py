"""Which names of a script are bound, and that they are put back."""
import sys

import pytest
from timm.task import ClassificationTask

from .stand_in import WITHOUT_TASKS, Script, train_one_epoch
from .test_options import TEACHER


@pytest.mark.parametrize('changes, missing', [
    ({'ClassificationTask': None}, 'ClassificationTask'),
    ({'train_one_epoch': None}, 'train_one_epoch(epoch, loader, task)'),
    ({'train_one_epoch': lambda epoch, model, loader, optimizer, loss_fn, args: None}, 'train_one_epoch(epoch, loader'),
    ({'resume_task_checkpoint': None}, 'resume_task_checkpoint'),
])
def test_a_script_without_the_seams_is_refused(changes, missing, capsys):
    with Script(**changes) as script, pytest.raises(SystemExit):
        script.parse(*TEACHER)
    error = capsys.readouterr().err
    assert f'somewhere/train.py has no {missing}' in error and 'timm 1.0.27 and later' in error
    script.parse()  # without --aikd it is no matter of ours


@pytest.mark.parametrize('changes', [{'create_loader': None}, {'validate': None}, {'validate': lambda model: None}])
def test_optional_seams_may_be_missing(changes):
    with Script(**changes) as script:
        script.parse(*TEACHER)
        assert script.globals['train_one_epoch'] is not train_one_epoch


def test_binds_and_puts_back():
    hook = sys.excepthook
    with Script() as script:
        script.parse()
        assert script.globals == script.before and sys.excepthook is hook
        script.parse(*TEACHER)
        script.parse(*TEACHER)  # a second main() in one process
        bound = {name for name, value in script.globals.items() if value != script.before[name]}
        assert bound == {
            'ClassificationTask', 'train_one_epoch', 'resume_task_checkpoint', 'create_loader', 'validate'}
        script.parse()
        assert script.globals == script.before and sys.excepthook is hook
        script.parse(*TEACHER)
    assert script.globals == script.before and sys.excepthook is hook


@pytest.mark.parametrize('changes, told', [
    ({'validate': lambda model: None, 'ClassificationTask': lambda model, criterion: None}, True),
    ({'validate': lambda model: None}, not hasattr(ClassificationTask, 'create_evaluator')),
    ({}, False), (WITHOUT_TASKS, False), ({**WITHOUT_TASKS, 'validate': None}, True),
])
def test_calibration_metrics_that_nobody_computes_are_named(changes, told, caplog):
    with Script(**changes) as script:
        script.parse(*TEACHER)
    assert any('eval_ece' in message for message in caplog.messages) is told
