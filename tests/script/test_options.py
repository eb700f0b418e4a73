"""What a parse refuses before anything is built."""
import pytest
import torch

from timm_aikd.script import autoload

from .stand_in import Script
from .test_autoload import training_parser

TEACHER = ['--aikd', '--aikd-teacher', 'test_resnet']
STORE = [*TEACHER, '--aikd-memory', 'store']


REFUSED = [
    (['--aikd'], '--aikd needs a teacher: --aikd-teacher with hf-hub:ORG/NAME'),
    (['--aikd', '--aikd-teacher', 'nowhere.pth'], 'no such file'),
    (['--aikd', '--aikd-teacher', 'resnet_of_nobody'], 'no such file, folder or timm model'),
    (['--aikd', '--aikd-teacher', 'timm/resnet18'], 'did you mean hf-hub:timm/resnet18'),
    (['--aikd', '--aikd-teacher', 'local-dir:/nowhere'], 'no config.json'),
    (['--aikd', '--aikd-teacher', '.'], 'not the output of a run'),
    ([*TEACHER, '--kd-model-name', 'resnet18'], '--kd-model-name resnet18 cannot go with --aikd'),
    ([*TEACHER, '--jsd-loss'], '--jsd-loss cannot go with --aikd'),
    ([*TEACHER, '--aug-splits', '3'], '--aug-splits 3 cannot go with --aikd'),
    ([*TEACHER, '--torchscript'], 'use --torchcompile'),
    ([*TEACHER, '--naflex-loader'], '--naflex-loader cannot go with --aikd'),
    ([*TEACHER, '--task', 'multilabel'], 'AI-KD is for single-label classification'),
    ([*TEACHER, '--aikd-alpha', '2'], '--aikd-alpha 2.0: allowed is number >= 0 and <= 1'),
    ([*TEACHER, '--aikd-alpha', 'x'], "argument --aikd-alpha: invalid float value: 'x'"),
    ([*TEACHER, '--aikd-teacher-temperature', 'x'], "invalid number or auto value: 'x'"),
    ([*TEACHER, '--aikd-adv-loss', 'gan'], "--aikd-adv-loss 'gan': allowed is bce, hinge"),
    ([*TEACHER, '--aikd-disc-hidden', '8', '0'], '--aikd-disc-hidden 0'),
    ([*TEACHER, '--aikd-disc-opt', 'nonsense'], '--aikd-disc-opt nonsense: cannot be used'),
    ([*TEACHER, '--aikd-disc-opt', 'adahessian'], 'needs second-order gradients'),
    ([*STORE, '--mixup', '0.4'], '--aikd-memory store: --mixup 0.4 mixes the samples of a batch; use --aikd-memory'),
    ([*STORE, '--cutmix', '1'], '--cutmix 1 mixes the samples'),
    ([*STORE, '--cutmix-minmax', '0.2', '0.8'], '--cutmix-minmax 0.2 0.8 mixes the samples'),
    ([*STORE, '--dataset', 'wds/shards'], '--dataset wds/shards is an iterable data set'),
    ([*STORE, '--dataset', 'hfids/name'], '--dataset hfids/name is an iterable data set'),
    ([*STORE, '--aug-splits', '3'], '--aug-splits 3 cannot go with --aikd'),
    ([*STORE, '--naflex-loader'], '--naflex-loader cannot go with --aikd'),
    ([*STORE, '--aikd-memory-topk', '0'], '--aikd-memory-topk 0: allowed is whole number >= 1'),
    ([*STORE, '--aikd-memory-topk', '11', '--num-classes', '10'], '11: allowed is 1 to the number of classes, 10'),
    ([*STORE, '--aikd-memory-topk', '1.5'], "invalid number or auto value: '1.5'"),
    ([*TEACHER, '--aikd-memory-dir', '/nowhere'], '--aikd-memory-dir /nowhere: cannot be written to (No such file'),
    ([*TEACHER, '--aikd-memory-dir', '/proc'], '--aikd-memory-dir /proc: cannot be written to'),
    ([*TEACHER, '--aikd-memory', 'disk'], 'allowed is auto, store, snapshot'),
    ([*TEACHER, '--eval-metric', 'ece'], '--eval-metric ece cannot go with --aikd', 'allowed is loss, top1, top5'),
    ([*TEACHER, '--eval-metric', 'aurc'], '--eval-metric aurc cannot go with --aikd'),
    ([*TEACHER, '--resume', 'nowhere.pth'], '--resume nowhere.pth: no such file'),
    ([*TEACHER, '--resume', '/tmp'], '--resume /tmp: is a folder', '/tmp/last.pth.tar'),
    (['--aikd', '--aikd-teacher', '~/nowhere.pth'], '--aikd-teacher ~/nowhere.pth: no such file'),
    (['--aikd', '--aikd-teachr', 'X'], 'unrecognized arguments: --aikd-teachr X; did you mean --aikd-teacher'),
    (['--aikd', '--aikd_teacher', 'X'], 'unrecognized arguments: --aikd_teacher X; did you mean --aikd-teacher'),
    (['--aikd_teacher', 'X'], 'unrecognized arguments: --aikd_teacher X; did you mean --aikd-teacher'),
    ([*TEACHER, '--aikd-kd-wieght=2'], 'unrecognized arguments: --aikd-kd-wieght=2; did you mean --aikd-kd-weight'),
    (['--aikd-teacher', 'test_resnet'], '--aikd-teacher does nothing without --aikd'),
    (['--aikd-alpha=0.5'], '--aikd-alpha does nothing without --aikd'),
]


@pytest.mark.parametrize('words, facts', [
    pytest.param(words, facts, id=' '.join(words)) for words, *facts in REFUSED])
def test_refused_by_the_parser_in_one_line(words, facts, capsys):
    with Script() as script, pytest.raises(SystemExit) as caught:
        script.parse(*words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and all(fact in error for fact in facts) and len(error) < 330
    assert script.globals == script.before


def test_yaml_options_without_the_switch_are_reported(caplog):
    with Script() as script:
        script.parse()
        assert not caplog.messages
        script.parser.set_defaults(aikd_alpha=0.6)
        script.parse()
    assert caplog.messages == ['AI-KD: aikd_alpha is set, but aikd is not: this is plain training']


def test_a_lazy_global_does_not_hide_the_parser():
    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError('not loaded yet')


    assert not autoload._is_training(Proxy()) and autoload._is_training(training_parser())


def test_an_unknown_flag_of_the_scripts_is_argparses_matter(capsys):
    with Script() as script, pytest.raises(SystemExit) as caught:
        script.parse(*TEACHER, '--batchsize', '5')
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error == 'train.py: error: unrecognized arguments: --batchsize 5'


@pytest.mark.parametrize('key, known', [
    ('aikd_alhpa', 'aikd_alpha'), ('aikd-teacher', 'aikd_teacher'), ('aikdd', 'aikd'),
    ('aikd_kd_wieght', 'aikd_kd_weight'),
])
@pytest.mark.parametrize('switch', [True, False])
def test_unknown_keys_of_a_yaml_file(key, known, switch, capsys):
    """timm's scripts make them defaults of the parser."""
    with Script() as script:
        script.parser.set_defaults(**{'aikd': switch, 'aikd_teacher': 'none', key: 1})
        with pytest.raises(SystemExit):
            script.parse()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f' {key}: ' in error and error.endswith(f'did you mean {known}')


def test_the_teacher_must_not_lie_where_the_run_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out/phase1').mkdir(parents=True)
    torch.save({}, tmp_path / 'out/phase1/model_best.pth.tar')
    (tmp_path / 'link').symlink_to('out')
    for spec in ('out/phase1', 'out/phase1/model_best.pth.tar'):
        words = ['--aikd', '--aikd-teacher', spec, '--output', 'link']
        with Script() as script:
            script.parse(*words, '--experiment', 'phase2')
            script.parse(*words)  # an output folder of its own
            with pytest.raises(SystemExit):
                script.parse(*words, '--experiment', 'phase1')
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f'--aikd-teacher {spec}' in error and 'link/phase1' in error and '--experiment' in error


def test_a_run_with_aikd_that_goes_on_without_it_is_told(tmp_path, caplog):
    path = str(tmp_path / 'last.pth.tar')
    for state, told in (({}, False), ({'aikd': {'version': 1, 'config': {}, 'epoch': 0}}, True)):
        torch.save({'state_dict': {}, 'task_state': state}, path)
        caplog.clear()
        with Script() as script:
            script.parse('--resume', path)
        assert any(f'--resume {path}' in message for message in caplog.messages) is told
    with Script() as script:
        script.parse('--resume', 'nowhere')  # the script's own matter
        script.parse('--resume', 'auto')
