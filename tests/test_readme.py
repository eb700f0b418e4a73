"""The README's commands, as they are written there, on a small data set; its Python, and that of the docstrings."""
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import save_for_hf

import timm_aikd
from timm_aikd import AikdConfig, AikdTask

from .conftest import ROOT
from .hub import HubServer

README = (ROOT / 'README.md').read_text()
ELSEWHERE = {  # commands that are not run here, and what runs them
    'pip install timm-aikd': 'no release yet',
    "pip install 'timm-aikd[plots]'": 'no release yet',
    "pip install '.[examples]' && python examples/quickstart.py": 'test_examples, shorter',
    "pip install -e '.[test]' && python -m pytest": '.ci/run',
}
SYNSETS = ImageNetInfo().label_names()[:100]
SMALL = ('--device cpu --input-size 3 32 32 --epochs 1 --warmup-epochs 0 -b 19 -j 1 --opt adamw --lr 1e-3 '
         '--checkpoint-hist 1')


def commands(language: str) -> list[str]:
    """What the README's blocks of a language hold: shell commands without comments, or the blocks as they are."""
    blocks = re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)
    if language != 'bash':
        return blocks
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line for line in (re.sub(r'(^|\s+)#.*', '', line) for line in lines) if line]


def write_images(folder: Path) -> None:
    """A hundred classes: three of twelve images in each split and of their own brightness, the others of one."""
    for split in ('train', 'validation'):
        for label, synset in enumerate(SYNSETS):
            (folder / split / synset).mkdir(parents=True)
            for i in range(12 if label < 3 else 1):
                Image.new('RGB', (48, 48), (80 * label % 240 + i,) * 3).save(folder / split / synset / f'{i}.png')


def write_teacher(folder: Path) -> None:
    """A resnet50 of ImageNet's classes whose last layer is fitted to the brightness of three."""
    torch.manual_seed(0)
    model = timm.create_model('resnet50').eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    levels = torch.arange(0, 180, 10)
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(
            (levels.view(-1, 1, 1, 1) / 255 - mean).expand(-1, 3, 32, 32) / std), pre_logits=True)
        design = torch.cat([features, torch.ones(len(levels), 1)], 1).double()
        target = nn.functional.one_hot((levels // 80).clamp(max=2), 1000).double() * 10
        solution = (torch.linalg.pinv(design) @ target).float()
    model.fc.load_state_dict({'weight': solution[:-1].T.contiguous(), 'bias': solution[-1]})
    model.pretrained_cfg.update(input_size=(3, 32, 32), test_input_size=(3, 32, 32))
    save_for_hf(model, folder, safe_serialization=True)


def test_commands_that_are_run_elsewhere_are_still_there():
    assert set(ELSEWHERE) <= set(commands('bash'))


def test_commands(tmp_path):
    write_images(tmp_path / 'DATA')
    write_teacher(tmp_path / 'teacher')
    shutil.copy(ROOT / 'examples' / 'train.py', tmp_path)
    # Python imports a sitecustomize before the script starts: the commands stay as written, and the runs get small
    (tmp_path / 'sitecustomize.py').write_text(
        f'import sys\nif sys.argv and sys.argv[0].endswith("train.py"):\n    sys.argv += {SMALL.split()!r}\n')
    with HubServer() as hub:
        hub.add('timm/resnet50.a1_in1k', tmp_path / 'teacher')
        environment = {
            **os.environ, **hub.environment(tmp_path / 'home'), 'HF_TOKEN': 'hf_standin',
            'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}', 'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
        known, ran = {name: value for name, value in environment.items() if value is not None}, {}
        for command in commands('bash'):
            if command not in ELSEWHERE:
                done = subprocess.run(
                    command, shell=True, cwd=tmp_path, env=known, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}'
                ran[command] = done.stdout
        published = hub.repositories['ORG/NAME']
        assert {'README.md', 'config.json', 'model.safetensors'} <= set(published.files(published.commit('main')))
    assert len(ran) == 5
    evaluated = next(output for command, output in ran.items() if command.startswith('timm-aikd evaluate'))
    assert all(name in evaluated for name in ('out/phase1', 'out/phase2', 'hf-hub:timm/resnet50.a1_in1k'))
    for folder in ('output', 'out/phase2'):
        summary, = (tmp_path / folder).rglob('summary.csv')
        assert 'train_aikd_kd' in summary.read_text().splitlines()[0]


DOCSTRINGS = [AikdTask.__doc__]


@pytest.mark.parametrize('example', [
    *commands('python'),
    *(textwrap.dedent(block) for text in DOCSTRINGS for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL)),
], ids=lambda text: text.split('\n')[0])
def test_python_examples(example, tiny_net, monkeypatch):
    """They run as they are, with a loader and modules that a reader would have; only the teacher is not downloaded."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 5)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model, steps = tiny_net(), []
    names = {
        'model': model, 'criterion': nn.CrossEntropyLoss(), 'loader': loader, 'validation_batches': loader,
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.1), 'AikdTask': AikdTask,
        'load_teacher': lambda spec, student: tiny_net()}
    monkeypatch.setattr(timm_aikd, 'load_teacher', names['load_teacher'])
    hook = model.register_forward_hook(lambda *_: steps.append(1) if model.training else None)
    exec(example.replace('epochs=90', 'epochs=3').replace('range(90)', 'range(3)'), names)
    hook.remove()
    assert len(steps) == 9 and isinstance(names['task'].aikd.config, AikdConfig)
    assert names['metrics']['alpha'] == pytest.approx(names['task'].aikd.config.alpha)
