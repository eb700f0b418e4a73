"""The examples as the README has them run, and the recipes as far as they can be checked without ImageNet."""
import importlib.util
import re
import sys

import pytest
import yaml

from timm_aikd import AikdConfig

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
        AikdConfig.add_arguments(module.parser)
        known = {action.dest for action in module.parser._actions}
        values = yaml.safe_load(text)
        assert set(values) <= known, name
        module.parser.set_defaults(**values)
        config = AikdConfig.from_args(module.parser.parse_args([]))
        assert config.has_teacher and config.teacher.startswith('hf-hub:')


def test_custom_loop():
    output = run(ROOT / 'examples' / 'custom_loop.py').stdout
    assert all(float(value) > 80 for value in re.findall(r'top-1 ([\d.]+) %', output)) and 'student' in output


def test_quickstart(tmp_path):
    done = run(ROOT / 'examples' / 'quickstart.py', '--output', tmp_path, '--seeds', '0', '--epochs', '8')
    assert 'AI-KD minus baseline' in done.stdout and (tmp_path / 'curves.png').stat().st_size > 5000
    for name in ('baseline', 'AI-KD'):
        assert float(re.search(rf'^{name} +([\d.]+)', done.stdout, re.MULTILINE)[1]) > 50


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
        ROOT / 'examples' / 'benchmark_memory.py', '--quick', '--sizes', 'CIFAR-100', '--ranks', '1', '2', '--folder',
        tmp_path)
    assert '| CIFAR-100, 500 x 100 | store | 212 | 106 kB | 106 kB / 106 kB |' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_readme_runs_what_ci_runs():
    readme, ci = (ROOT / 'README.md').read_text(), (ROOT / '.ci' / 'run').read_text()
    command = next(line for line in ci.splitlines() if 'python -m pytest' in line)
    assert command.replace('pip install -q', 'pip install') in readme
    assert "pip install '.[examples]' && python examples/quickstart.py" in readme
