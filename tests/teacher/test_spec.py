"""What a spec names, told from its form and the disk."""
import pytest

from timm_aikd import load_teacher
from timm_aikd.teacher import TeacherSpec

from ..support.teachers import refused, save, source


def test_none_is_no_teacher(student):
    assert load_teacher('none', student=student) is None


@pytest.mark.parametrize('spec, parsed', [
    ('none', ('none', '', None)),
    ('hf-hub:timm/resnet50.a1_in1k', ('hub', 'timm/resnet50.a1_in1k', None)),
    ('hf-hub:a/b-c_d.e@refs/pr/1', ('hub', 'a/b-c_d.e', 'refs/pr/1')),
    ('hf_hub:a/b@v1.0', ('hub', 'a/b', 'v1.0')),
    ('resnet50', ('name', 'resnet50', None)),
    ('resnet50.a1_in1k', ('name', 'resnet50.a1_in1k', None)),
    ('local-dir:kept', ('folder', 'kept', None)),
    ('kept/x.safetensors', ('file', 'kept/x.safetensors', None)),
    ('run', ('file', 'run/model_best.pth.tar', None)),
])
def test_a_spec_is_told_by_its_form(folder, spec, parsed):
    for path in ('kept/config.json', 'kept/x.safetensors', 'run/model_best.pth.tar'):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    found = TeacherSpec.parse(spec)
    assert (found.kind, found.value, found.revision) == parsed and found.text == spec


@pytest.mark.parametrize('spec, fragment', [
    ('nonsense', 'allowed: hf-hub:ORG/NAME'),
    ('', 'is empty; allowed: hf-hub:ORG/NAME'),
    (' ', 'is empty'),
    ('ftp://host/x', 'allowed: hf-hub:ORG/NAME'),
    ('timm/resnet18', 'did you mean hf-hub:timm/resnet18'),
    ('hf-hub:', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:x', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/../b', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/..', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@../../c', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@v1@v2', 'hf-hub:ORG/NAME[@REVISION]'),
    ('local-dir:missing', 'no config.json'),
    ('local-dir:kept', 'save_for_hf'),
    ('missing.pth', 'no such file'),
    ('missing/model_best.pth.tar', 'no such file'),
    ('folder.pth', 'not the output of a run'),
    ('kept', 'no model_best.pth.tar'),
    ('published', 'use local-dir:published'),
])
def test_a_spec_that_leads_nowhere_is_refused(folder, student, spec, fragment):
    for name in ('kept', 'folder.pth', 'published'):
        (folder / name).mkdir()
    (folder / 'published' / 'config.json').touch()
    refused(spec, student, fragment)


@pytest.mark.parametrize('spec, fragment', [
    ('runs/phase9', 'no such file, folder or timm model; did you mean runs/phase1'),
    ('runs/phase1/model_bets.pth.tar', 'no such file; did you mean runs/phase1/model_best.pth.tar'),
    ('runz', 'did you mean runs'),
    ('resnt50', 'did you mean resnet50'),
    ('resnt50.a1_in1k', 'did you mean resnet50'),
    ('runs', 'it holds runs, name one: runs/first, runs/phase1'),
    ('~/runs/phase9', 'did you mean ~/runs/phase1'),
])
def test_a_misspelt_spec_is_told_the_nearest_one(folder, student, monkeypatch, spec, fragment):
    monkeypatch.setenv('HOME', str(folder))
    for name in ('phase1', 'first'):
        (folder / 'runs' / name).mkdir(parents=True)
        (folder / 'runs' / name / 'model_best.pth.tar').touch()
    refused(spec, student, fragment)


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    (folder / 'run').mkdir()
    for name in ('run/model_best.pth.tar', 'run/config.json'):
        (folder / name).touch()
    assert TeacherSpec.parse('~/run').value == str(folder / 'run/model_best.pth.tar')
    assert TeacherSpec.parse('local-dir:~/run').value == str(folder / 'run')


@pytest.mark.parametrize('name', ['x.ckpt', 'x.pkl', 'X.PTH', 'x', 'x.weights.v2', 'resnet50'])
@pytest.mark.parametrize('as_safetensors', [False, True])
def test_an_existing_file_is_read_whatever_its_ending(folder, student, name, as_safetensors):
    save(source(1), 'x.safetensors' if as_safetensors else 'x.pth')
    (folder / ('x.safetensors' if as_safetensors else 'x.pth')).rename(name)
    assert load_teacher(name, student, default_model_name='test_resnet').name == name
