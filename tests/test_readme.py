"""README and guides: commands and Python run as written, on a small data set; tables and links are right."""
import copy
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
from .support.hub import HubServer
from .support.readme import PAGES, TABLES, with_table

README = (ROOT / 'README.md').read_text()
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
ELSEWHERE = {  # commands that are not run here, and what runs them
    'pip install timm-aikd': 'no release yet',
    "pip install '.[examples]' && python examples/quickstart.py": 'test_examples, shorter',
    "pip install -e '.[test]' && python -m pytest": '.ci/run',
}
SYNSETS = ImageNetInfo().label_names()[:100]
SMALL = ('--device cpu --input-size 3 32 32 --epochs 1 --warmup-epochs 0 -b 19 -j 1 --opt adamw --lr 1e-3 '
         '--checkpoint-hist 1')


def blocks(language: str) -> list[str]:
    return [block for text in TEXTS.values()
            for block in re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)]


def commands() -> list[str]:
    """The shell commands, without comments."""
    lines = '\n'.join(blocks('bash')).replace('\\\n', ' ').splitlines()
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
    assert set(ELSEWHERE) <= set(commands())


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
        for command in commands():
            if command not in ELSEWHERE:
                done = subprocess.run(
                    command, shell=True, cwd=tmp_path, env=known, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}'
                ran[command] = done.stdout
        published = hub.repositories['ORG/NAME']
        assert {'README.md', 'config.json', 'model.safetensors'} <= set(published.files(published.commit('main')))
    assert len(ran) == 5
    evaluated = next(output for command, output in ran.items() if command.startswith('timm-aikd evaluate'))
    assert all(f'| {name} |' in evaluated for name in ('out/phase1', 'out/phase2'))
    for folder in ('output', 'out/phase2'):
        summary, = (tmp_path / folder).rglob('summary.csv')
        assert 'train_aikd_kd' in summary.read_text().splitlines()[0]


@pytest.fixture
def names(tiny_net, monkeypatch):
    """What a reader would have around the Python examples; only the teacher is not downloaded."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 5)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model, teacher = tiny_net(), tiny_net()
    monkeypatch.setattr(timm_aikd, 'load_teacher', lambda spec, student: copy.deepcopy(teacher))
    return {
        'model': model, 'criterion': nn.CrossEntropyLoss(), 'loader': loader, 'validation_batches': loader,
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.1), 'AikdTask': AikdTask,
        'load_teacher': timm_aikd.load_teacher}


def run_example(text: str, names: dict, epochs: int) -> int:
    """The example for so many of three epochs; how many steps it took."""
    steps = []
    hook = names['model'].register_forward_hook(lambda *_: steps.append(1) if names['model'].training else None)
    exec(re.sub(r'range\((start, )?90\)', rf'range(\g<1>{epochs})', text.replace('epochs=90', 'epochs=3')), names)
    hook.remove()
    return len(steps)


def test_the_loop_of_the_readme_resumes(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, = blocks('python')
    assert run_example(loop, names, epochs=2) == 6
    first = names['task']
    assert run_example(loop, names, epochs=3) == 3
    assert names['task'] is not first and names['metrics']['alpha'] == pytest.approx(AikdConfig().alpha)
    assert names['metrics']['progressive'] != names['metrics']['task']  # the store's table is back


@pytest.mark.parametrize('example', re.findall(r'```python\n(.*?)```', AikdTask.__doc__, re.DOTALL))
def test_python_in_docstrings(example, names):
    assert run_example(textwrap.dedent(example), names, epochs=3) == 9
    assert names['metrics']['alpha'] == pytest.approx(names['task'].aikd.config.alpha)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_no_page_has_an_em_dash():
    assert [name for name, text in TEXTS.items() if '\N{EM DASH}' in text] == []


@pytest.mark.parametrize('name', TABLES)
def test_tables_are_those_of_the_code(name):
    """Else write them again: python -m tests.support.readme"""
    path, table = TABLES[name]
    assert with_table(path.read_text(), name, table()) == path.read_text()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r'^#+ (.*)', re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', TEXTS[page].replace('\n', ' '))
    for link in links:
        target, _, anchor = link.partition('#')
        if target.startswith('https://'):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_every_guide_is_linked():
    for name in TEXTS:
        assert name == 'README.md' or f'({name}' in README, name


def test_the_options_that_matter_have_their_defaults():
    section = re.search(r'^## The options that matter\n(.*?)^## ', README, re.DOTALL | re.MULTILINE)[1]
    shown = dict(re.findall(r'^\| `--aikd-([\w-]+)` \| (\S*) ?\|', section, re.MULTILINE))
    assert len(shown) == 8
    defaults = AikdConfig().to_dict()
    for name, default in shown.items():
        value = defaults[name.replace('-', '_')]
        assert default == ('' if value is None else str(value)), name


def test_every_flag_in_a_page_exists():
    known = {f'--aikd-{name.replace("_", "-")}' for name in AikdConfig().to_dict()}
    for name, text in TEXTS.items():
        assert set(re.findall(r'--aikd-[\w-]+', text)) <= known, name
