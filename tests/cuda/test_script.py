"""Training scripts with --amp, end to end: ours, and timm's newest where TIMM_TRAIN_SCRIPTS holds it."""
import csv

import pytest
import timm
import torch
from timm.models import save_for_hf

from ..conftest import SMALL_RUN, run, training_scripts


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    save_for_hf(model, tmp_path / 'teacher', safe_serialization=True)
    return f'local-dir:{tmp_path / "teacher"}'


def train(script, images, folder, teacher, device, *more):
    run(
        '-m', 'timm_aikd', 'run', script, '--data-dir', images, *SMALL_RUN, '--device', device, '--output', folder,
        '--experiment', device, '--channels-last', '--aikd', '--aikd-teacher', teacher,
        '--aikd-teacher-temperature', '1', '--aikd-disc-hidden', '8', *more)
    with open(folder / device / 'summary.csv') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('script', ['examples', 'newest'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_trains_with_amp(device, script, dtype, image_folder, teacher, tmp_path):
    path = training_scripts()[script]
    if path is None:
        pytest.skip('set TIMM_TRAIN_SCRIPTS to a folder with newest/train.py')
    if device.type == 'cpu' and (script, dtype) != ('examples', 'bfloat16'):
        pytest.skip('on the CPU one of these will do')
    rows = train(path, image_folder, tmp_path, teacher, device.type, '--amp', '--amp-dtype', dtype)
    assert len(rows) == 2 and float(rows[1]['train_aikd_alpha']) == pytest.approx(0.8)
    assert all(float(row['train_aikd_disc_skipped']) == 0 for row in rows)
    assert (tmp_path / device.type / 'aikd-memory-1.safetensors').is_file()
    if device.type == 'cpu' or dtype == 'float16':  # whose scaler skips the first steps
        return
    expected = train(path, image_folder, tmp_path, teacher, 'cpu')  # in float32
    for name in ('task', 'progressive', 'kd', 'adv', 'disc'):
        ours, theirs = (float(each[1][f'train_aikd_{name}']) for each in (rows, expected))
        assert ours == pytest.approx(theirs, rel=0.1, abs=0.01), name
