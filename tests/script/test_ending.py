"""How a script under AI-KD ends: only one that ended normally without a step has failed to train with AI-KD."""
import pytest
import torch

from timm_aikd.script import autoload

from ..conftest import run

SCRIPT = f'''
import argparse, sys
from timm.task import ClassificationTask, resume_task_checkpoint

parser = argparse.ArgumentParser()
for name in {sorted(autoload.SIGNATURE - {'epochs'})}:
    parser.add_argument('--' + name.replace('_', '-'))
for name in ('epochs', 'start-epoch', 'stop-epoch'):
    parser.add_argument('--' + name, type=int)
parser.add_argument('--resume')
parser.set_defaults(epochs=3)

def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    pass

if __name__ == '__main__':
    args = parser.parse_args()
'''


@pytest.fixture
def end(tmp_path):
    """Exit code and standard error of the script with these last lines and arguments."""
    def call(last, *words):
        (tmp_path / 'train.py').write_text(SCRIPT + f'    {last}\n')
        done = run('-m', 'timm_aikd', tmp_path / 'train.py', '--aikd', '--aikd-teacher', 'none', *words, check=False)
        return done.returncode, done.stderr
    return call


@pytest.mark.parametrize('last', ['pass', 'sys.exit()', 'sys.exit(0)'])
def test_a_normal_end_without_a_step_is_an_error(end, last):
    code, error = end(last)
    assert code == 1 and error.startswith('error: --aikd was given, but no AI-KD step was ever taken')


@pytest.mark.parametrize('last, code, words', [
    ('sys.exit("last words")', 1, 'last words\n'), ('sys.exit(3)', 3, ''), ('1 / 0', 1, 'ZeroDivisionError'),
    ('parser.error("no such data")', 2, 'error: no such data\n'),
])
def test_a_failing_script_says_so_itself(end, last, code, words):
    ended, error = end(last)
    assert ended == code and words in error and 'AI-KD step' not in error


def test_a_mistyped_flag_is_argparses_error(end):
    code, error = end('pass', '--batchsize', '5')
    assert code == 2 and error.endswith('error: unrecognized arguments: --batchsize 5\n')


@pytest.mark.parametrize('epoch, words, code', [
    (2, [], 0), (1, [], 1), (1, ['--stop-epoch', '2'], 0), (2, ['--epochs', '4'], 1), (0, ['--start-epoch', '3'], 0),
    (2, ['--start-epoch', '0'], 1),
])
def test_a_finished_run_ends_as_the_script_ends_it(end, tmp_path, epoch, words, code):
    torch.save({'epoch': epoch, 'version': 2, 'state_dict': {}}, tmp_path / 'last.pth.tar')
    ended, error = end('pass', '--resume', tmp_path / 'last.pth.tar', *words)
    assert ended == code and ('AI-KD step' in error) is (code == 1)
