"""Training scripts, ours and timm's unmodified ones, run as a user runs them."""
import csv
import os
import shlex
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from safetensors import safe_open

from timm_aikd import RecordFormat
from timm_aikd.memory.records import version_at

from ..conftest import ROOT, SMALL_RUN, WITHOUT_TASKS, run, training_scripts
from ..support.hub import HubServer


def command(script, images, output, name, *more):
    return [script, '--data-dir', images, *SMALL_RUN, '--output', output, '--experiment', name, *more]


def summary(folder):
    with open(folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


def checkpoint(folder, name='last'):
    return torch.load(folder / f'{name}.pth.tar', weights_only=False)


@pytest.fixture(scope='session')
def phase1(image_folder, tmp_path_factory):
    """Output folder of a plain run of our own script: a teacher."""
    output = tmp_path_factory.mktemp('phase1')
    run(*command(ROOT / 'examples' / 'train.py', image_folder, output, 'plain', '--epochs', '6'))
    return output / 'plain'


def aikd(teacher, *more):
    return ['--aikd', '--aikd-teacher', teacher, '--aikd-disc-hidden', '8', *more]


def test_inert_without_the_flag(train_script, image_folder, tmp_path):
    """Bit-identical weights and summary with the plug-in armed and with torch's plug-ins off."""
    run(*command(train_script, image_folder, tmp_path, 'armed'))
    run(*command(train_script, image_folder, tmp_path, 'off'), TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert (tmp_path / 'armed/summary.csv').read_bytes() == (tmp_path / 'off/summary.csv').read_bytes()
    armed, off = (checkpoint(tmp_path / name)['state_dict'] for name in ('armed', 'off'))
    assert armed.keys() == off.keys() and all(torch.equal(armed[key], off[key]) for key in armed)


def test_trains_resumes_and_logs(train_script, image_folder, phase1, tmp_path):
    done = run(*command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--model-ema'))
    log = done.stdout + done.stderr
    assert 'teacher top-1' in log and 'T_c fitted to them' in log and 'progressive (alpha to 0.8' in log
    assert 'memory store, 36 samples with 3 of 3 log-probabilities' in log
    assert (tmp_path / 'student/aikd-memory-1.safetensors').is_file()
    rows = summary(tmp_path / 'student')
    assert len(rows) == 2 and float(rows[1]['train_aikd_alpha']) == 0.8
    for column in ('task', 'progressive', 'kd', 'adv', 'disc', 'disc_accuracy', 'disc_skipped', 'teacher_top1'):
        assert float(rows[1][f'train_aikd_{column}']) >= 0
    assert all(float(rows[1][name]) > 0 for name in ('eval_ece', 'eval_aurc'))

    saved = checkpoint(tmp_path / 'student')
    assert saved['args'].aikd_kd_weight == 1.0 and 'task_state_ema' not in saved
    plain = timm.create_model('test_resnet', num_classes=3)
    assert saved['state_dict'].keys() == plain.state_dict().keys()
    assert yaml.safe_load((tmp_path / 'student/args.yaml').read_text())['aikd_disc_hidden'] == [8]

    resumed = run(*command(
        train_script, image_folder, tmp_path, 'resumed', *aikd(phase1), '--model-ema', '--epochs', '3',
        '--resume', tmp_path / 'student/last.pth.tar'))
    assert 'T_c fitted' not in resumed.stdout + resumed.stderr  # T_c is the checkpoint's
    assert 'prediction memory of epoch 1 restored, 36 samples' in resumed.stdout + resumed.stderr
    again = checkpoint(tmp_path / 'resumed')
    assert again['epoch'] == again['task_state']['aikd']['epoch'] == 2
    state, first = again['task_state']['aikd'], saved['task_state']['aikd']
    assert state['teacher_temperature'] == first['teacher_temperature']
    steps = [entry['discriminator']['optimizer']['state'][0]['step'].item() for entry in (first, state)]
    assert steps == [2 * 6, 3 * 6]
    timm.create_model('test_resnet', num_classes=3, checkpoint_path=tmp_path / 'student/last.pth.tar')


def test_one_phase_from_a_model_of_other_classes(train_script, image_folder, tmp_path):
    """What a fine-tuning starts from is its teacher: no phase 1, no classes in common, no T_c."""
    torch.manual_seed(1)
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=9), tmp_path / 'pretrained')
    flags = ('--aikd', '--aikd-teacher', f'local-dir:{tmp_path / "pretrained"}', '--aikd-feature-weight', '3',
             *shlex.split('--aikd-kd-weight 0 --aikd-alpha 0 --aikd-adv-weight 0'))
    done = run(*command(train_script, image_folder, tmp_path, 'student', *flags))
    log = done.stdout + done.stderr
    assert 'its features alone' in log and 'T_c fitted' not in log and 'terms: features (3)' in log
    rows = summary(tmp_path / 'student')
    assert [float(row['train_aikd_features']) > 0 for row in rows] == [True, True]
    again = run(*command(
        train_script, image_folder, tmp_path, 'again', *flags, '--epochs', '3', '--resume',
        tmp_path / 'student/last.pth.tar'))
    assert 'start fresh' not in again.stdout + again.stderr
    assert [row['epoch'] for row in summary(tmp_path / 'again')] == ['2']


def test_yaml_config_and_the_explicit_launcher(train_script, image_folder, phase1, tmp_path):
    config = dict(aikd=True, aikd_teacher=str(phase1), aikd_disc_hidden=[8], aikd_teacher_temperature=2, aikd_alpha=0.4)
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(config))
    words = command(train_script, image_folder, tmp_path, 'student', '--config', tmp_path / 'config.yaml')
    done = run('-m', 'timm_aikd', *words, '--aikd-alpha', '0.6', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    saved = checkpoint(tmp_path / 'student')
    assert saved['args'].aikd_alpha == 0.6 and 'at T_c 2.000' in done.stdout + done.stderr
    assert float(summary(tmp_path / 'student')[1]['train_aikd_alpha']) == 0.6


def needs_tasks(script):
    if script.parent.name in WITHOUT_TASKS:
        pytest.skip('names the CPU to DDP, which refuses; test_every_way mends that and runs its ranks')


@pytest.mark.parametrize('launcher', [
    pytest.param([], id='plain'), pytest.param(['-m', 'timm_aikd'], id='explicit', marks=pytest.mark.slow)])
def test_two_ranks_under_torchrun(train_script, image_folder, phase1, tmp_path, launcher):
    needs_tasks(train_script)
    run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *launcher,
        *command(train_script, image_folder, tmp_path, 'student', *aikd(phase1)))
    rows = summary(tmp_path / 'student')
    assert len(rows) == 2 and float(rows[1]['train_aikd_progressive']) > 0
    with safe_open(tmp_path / 'student/aikd-memory-1.safetensors', 'np') as file:
        records = file.get_tensor('records').view(RecordFormat(3).numpy)  # both ranks' halves, in one table
    assert (records['version'] >= version_at(1, 0, 0)).all() and set((records['version'] % 2 ** 16).flatten()) == {0, 1}
    # 36 images on 2 ranks in batches of 6 are 3 steps an epoch
    state = checkpoint(tmp_path / 'student')['task_state']['aikd']
    assert state['discriminator']['optimizer']['state'][0]['step'].item() == 6


def test_a_plain_checkpoint_resumes_under_aikd(train_script, image_folder, phase1, tmp_path):
    done = run(*command(
        train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--epochs', '7', '--resume',
        phase1 / 'last.pth.tar', '--aikd-memory', 'snapshot'))
    assert 'without AI-KD' in done.stdout + done.stderr
    row, = summary(tmp_path / 'student')
    assert row['epoch'] == '6' and float(row['train_aikd_progressive']) > 0  # the snapshot is the checkpoint's student


def test_help_lists_the_group(train_script):
    text = run(train_script, '--help').stdout
    assert 'AI-KD:' in text and '--aikd-teacher SPEC' in text
    assert '--aikd' not in run(train_script, '--help', TIMM_AIKD_AUTOLOAD='0').stdout


@pytest.mark.parametrize('criterion', [
    ['--bce-loss', '--bce-sum', '--smoothing', '0.1'],  # without smoothing timm's script makes a cross-entropy of it
    ['--mixup', '0.4', '--smoothing', '0.1'],
])
def test_other_criteria(train_script, image_folder, phase1, tmp_path, criterion):
    done = run(*command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), *criterion))
    assert float(summary(tmp_path / 'student')[1]['train_aikd_kd']) > 0
    log = done.stdout + done.stderr
    assert ('not store, because --mixup 0.4' if '--mixup' in criterion else '3 of 3 logits') in log


@pytest.mark.parametrize('words', [
    ['--aug-repeats', '3'], ['--use-multi-epochs-loader'], ['--no-prefetcher'], ['--train-img-sizes', '32', '24'],
], ids=' '.join)
def test_loaders_that_the_store_must_follow(train_script, image_folder, phase1, tmp_path, words):
    if words[0] not in train_script.read_text():
        pytest.skip(f'{train_script.parent.name} has no {words[0]}')
    if words[0] == '--aug-repeats':
        needs_tasks(train_script)
    ranks = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = run(*(ranks if words[0] == '--aug-repeats' else []), *command(
        train_script, image_folder, tmp_path, 'student', *aikd(phase1), *words, '--aikd-memory', 'store',
        '--epochs', '3'))
    row = summary(tmp_path / 'student')[-1]
    assert float(row['train_aikd_progressive']) > 0 and 'another label' not in done.stdout + done.stderr


def test_store_with_mixup_is_refused_before_anything_is_built(train_script, image_folder, phase1, tmp_path):
    words = command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--aikd-memory', 'store')
    assert '--mixup 0.2 mixes the samples of a batch; use --aikd-memory snapshot' in failure(
        *words, '--mixup', '0.2', code=2)
    assert not (tmp_path / 'student').exists()


def killed_run(words, folder, moment):
    """Start a training, kill it when `moment` says so, and return the last checkpoint, if there is one."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not moment() and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    last = folder / 'last.pth.tar'
    return last if last.exists() else None


def test_killed_and_resumed_with_the_exact_table(image_folder, phase1, tmp_path):
    folder, scratch = tmp_path / 'student', tmp_path / 'scratch'
    scratch.mkdir()
    words = command(
        training_scripts()['examples'], image_folder, tmp_path, 'student', *aikd(phase1), '--aikd-memory', 'store',
        '--aikd-memory-dir', scratch, '--epochs', '200')
    last = killed_run(words, folder, (folder / 'checkpoint-2.pth.tar').exists)
    assert list(scratch.iterdir()) == []
    epoch = torch.load(last, weights_only=False)['epoch']
    done = run(*words, '--epochs', epoch + 2, '--resume', last)
    assert f'prediction memory of epoch {epoch} restored, 36 samples' in done.stdout + done.stderr


def test_no_validation_split(image_folder, phase1, tmp_path):
    done = run(*command(
        training_scripts()['examples'], image_folder, tmp_path, 'student', *aikd(phase1), '--val-split', ''))
    assert 'T_c = 1' in done.stdout + done.stderr
    assert 'eval_ece' not in summary(tmp_path / 'student')[0]


def test_validation_on_training_images_fits_no_temperature(train_script, image_folder, phase1, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/train').symlink_to(image_folder / 'train')
    runs = {'folder': (tmp_path / 'data', []), 'split': (image_folder, ['--val-split', 'train'])}
    for name, (data, more) in runs.items():
        done = run(*command(train_script, data, tmp_path, name, *aikd(phase1), '--epochs', '1', *more))
        log = done.stdout + done.stderr
        assert log.count('gives the training images') == 1 and 'at T_c 1.000' in log and 'T_c fitted' not in log


def test_one_channel_with_means_of_its_own(image_folder, tmp_path):
    gray = ['--in-chans', '1', '--input-size', '1', '32', '32', '--mean', '0.4', '--std', '0.3']
    script = training_scripts()['examples']
    run(*command(script, image_folder, tmp_path, 'teacher', *gray, '--epochs', '6'))
    other = [*gray[:-3], '0.2', '--std', '0.5']
    done = run(*command(script, image_folder, tmp_path, 'student', *other, *aikd(tmp_path / 'teacher')))
    # the teacher's own accuracy is kept although the student is fed otherwise
    best = max(float(row['eval_top1']) for row in summary(tmp_path / 'teacher'))
    assert f'AI-KD: teacher top-1 {best:.2f} %' in done.stdout + done.stderr


def failure(*words, code=1, **env):
    """The one line on standard error of a run that must fail, without a traceback."""
    done = run(*words, check=False, **env)
    assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_late_errors_end_in_one_line_and_harm_nothing(train_script, image_folder, phase1, tmp_path):
    script = train_script
    line = failure(*command(script, image_folder, tmp_path, 'student', *aikd(phase1), '--num-classes', '7'))
    assert line.startswith('error: --aikd-teacher') and 'has 3 classes, the student has 7' in line
    assert not (tmp_path / 'student').exists()
    done = run(
        *command(script, image_folder, tmp_path, 'student', *aikd(phase1), '--num-classes', '7'), check=False,
        TIMM_AIKD_TRACEBACK='1')
    assert done.returncode == 1 and 'Traceback' in done.stderr


def test_a_teacher_with_the_wrong_class_order_stops_the_run(image_folder, phase1, tmp_path):
    # three epochs of classes shifted by one: right on few, and never named
    weights = checkpoint(phase1, 'model_best')
    for key in ('fc.weight', 'fc.bias'):
        weights['state_dict'][key] = weights['state_dict'][key].roll(1, 0)
    torch.save(weights, tmp_path / 'shifted.pth.tar')
    big = ['--epochs', '40', '--aikd-teacher-temperature', '1']
    line = failure(*command(
        training_scripts()['examples'], image_folder, tmp_path, 'student', *aikd(tmp_path / 'shifted.pth.tar'), *big))
    assert 'no better than chance' in line and 'wrong class order' in line


def test_a_teacher_follows_a_shuffled_class_order(train_script, image_folder, phase1, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=phase1 / 'model_best.pth.tar')
    save_for_hf(model, tmp_path / 'teacher', safe_serialization=True, model_config={
        'label_names': ['class0', 'class1', 'class2']})
    (tmp_path / 'classes.txt').write_text('class2\nclass0\nclass1\n')
    done = run(*command(
        train_script, image_folder, tmp_path, 'student', *aikd(f'local-dir:{tmp_path}/teacher'), '--class-map',
        tmp_path / 'classes.txt', '--epochs', '1'))
    log, best = done.stdout + done.stderr, max(float(row['eval_top1']) for row in summary(phase1))
    assert 'reordered by name' in log and f'AI-KD: teacher top-1 {best:.2f} %' in log and best > 60


def test_an_imagenet_teacher_of_a_part_of_its_classes(train_script, image_folder, tmp_path):
    """Folders named by WordNet ids, as those of Imagenette; a teacher with the 1,000 classes of ImageNet."""
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split).mkdir(parents=True)
        for number, name in enumerate(('n01440764', 'n02102040', 'n02979186')):
            (tmp_path / 'data' / split / name).symlink_to(image_folder / split / f'class{number}')
    torch.save(timm.create_model('test_resnet', num_classes=1000).state_dict(), tmp_path / 'imagenet.pth')
    done = run(*command(train_script, tmp_path / 'data', tmp_path, 'student', *aikd(tmp_path / 'imagenet.pth')))
    assert 'AI-KD: the student has 3 of 1000 classes of the teacher' in done.stdout + done.stderr
    assert float(summary(tmp_path / 'student')[1]['train_aikd_kd']) > 0


def test_a_finished_run_resumed_ends_as_the_script_ends_it(train_script, image_folder, phase1, tmp_path):
    done = run(*command(
        train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--resume', phase1 / 'last.pth.tar'))
    assert 'AI-KD step' not in done.stderr


def auto(script, images, output, teacher, *more):
    words = ['--resume', 'auto', '--epochs', '4', '--checkpoint-hist', '1', *more]
    return command(script, images, output, 'student', *aikd(teacher), *words)


@pytest.fixture
def script_with_auto(train_script):
    if '--stop-epoch' not in train_script.read_text():
        pytest.skip(f'{train_script.parent.name} has no --resume auto')
    return train_script


def test_resume_auto_stop_epoch_and_milestones(script_with_auto, image_folder, phase1, tmp_path):
    """Nothing there: fresh. Something there: in place, with all of AI-KD's state. A finished run: nothing to do."""
    words = auto(script_with_auto, image_folder, tmp_path, phase1, '--save-epochs', '1', '2')
    folder = tmp_path / 'student'
    first = run(*words, '--stop-epoch', '2')
    assert 'restored' not in first.stdout + first.stderr and [row['epoch'] for row in summary(folder)] == ['0', '1']
    before = checkpoint(folder)['task_state']['aikd']
    second = run(*words)
    log = second.stdout + second.stderr
    assert 'prediction memory of epoch 1 restored, 36 samples' in log and 'T_c fitted' not in log
    rows, after = summary(folder), checkpoint(folder)['task_state']['aikd']
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    alphas = [float(row['train_aikd_alpha']) for row in rows]
    assert alphas[1:] == pytest.approx([0.8 * epoch / 4 for epoch in (2, 3, 4)])  # of --epochs, not of --stop-epoch
    assert after['teacher_temperature'] == before['teacher_temperature']
    steps = [state['discriminator']['optimizer']['state'][0]['step'].item() for state in (before, after)]
    assert steps == [2 * 6, 4 * 6]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    third = run(*words)
    assert 'AI-KD step' not in third.stderr and files.keys() == {path.name for path in folder.iterdir()}
    assert summary(folder) == rows and checkpoint(folder)['epoch'] == 3

    for epochs in (1, 2):  # a milestone keeps its memory
        milestone = folder / f'milestone-{epochs}.pth.tar'
        assert checkpoint(folder, f'milestone-{epochs}')['epoch'] == epochs - 1
        done = run(*command(
            script_with_auto, image_folder, tmp_path, f'from{epochs}', *aikd(phase1), '--epochs', str(epochs + 1),
            '--resume', milestone))
        assert f'prediction memory of epoch {epochs - 1} restored' in done.stdout + done.stderr


def test_a_script_that_does_not_know_auto_says_so(train_script, image_folder, phase1, tmp_path):
    if '--stop-epoch' in train_script.read_text():
        pytest.skip('it knows')
    line = failure(*auto(train_script, image_folder, tmp_path, phase1))
    assert line.startswith('error: --resume auto: ') and not (tmp_path / 'student').exists()


def test_one_process_trains_again_and_again(script_with_auto, image_folder, phase1, tmp_path):
    """As a sweep does: with AI-KD, without it, and on with the first run; each is what it is alone."""
    plain = command(script_with_auto, image_folder, tmp_path, 'plain')
    words = auto(script_with_auto, image_folder, tmp_path, phase1)
    runs = [[*words, '--stop-epoch', '2'], plain, words, words]
    (tmp_path / 'sweep.py').write_text(
        f'import sys\nsys.path.insert(0, {str(script_with_auto.parent)!r})\nimport train\n'
        f'for sys.argv in {[list(map(str, words)) for words in runs]}:\n    train.main()\n')
    done = run(tmp_path / 'sweep.py')
    log = done.stdout + done.stderr
    assert 'prediction memory of epoch 1 restored' in log and checkpoint(tmp_path / 'student')['epoch'] == 3
    swept = checkpoint(tmp_path / 'plain')
    run(*command(script_with_auto, image_folder, tmp_path, 'plain'))
    alone = checkpoint(tmp_path / 'plain')
    assert 'aikd' not in swept.get('task_state', {})
    assert all(torch.equal(weight, swept['state_dict'][key]) for key, weight in alone['state_dict'].items())


def test_a_teacher_that_changed_before_a_resume_is_refused(train_script, image_folder, phase1, tmp_path):
    teacher = tmp_path / 'teacher.pth.tar'
    torch.save(checkpoint(phase1), teacher)
    words = command(train_script, image_folder, tmp_path, 'student', *aikd(teacher))
    run(*words)
    other = checkpoint(phase1)
    other['state_dict']['fc.bias'] += 1
    torch.save(other, teacher)
    line = failure(*words, '--epochs', '3', '--resume', tmp_path / 'student/last.pth.tar')
    assert line.startswith('error: ') and str(teacher) in line and '--aikd-teacher' in line


def test_hub_teacher_online_pinned_and_from_the_cache(train_script, image_folder, phase1, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=phase1 / 'model_best.pth.tar')
    save_for_hf(model, tmp_path / 'repo', safe_serialization=True)
    with HubServer() as hub:
        commit = hub.add('org/teacher', tmp_path / 'repo')
        hub.add('org/teacher', tmp_path / 'repo', revision='v1')
        online = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'cache'), HF_HUB_DISABLE_XET='1')
        for name, spec in (('first', 'hf-hub:org/teacher'), ('pinned', 'hf-hub:org/teacher@v1')):
            words = command(train_script, image_folder, tmp_path, name, '--epochs', '1')
            run(*words, *aikd(spec), **online)
            assert float(summary(tmp_path / name)[0]['train_aikd_teacher_top1']) > 50
            assert checkpoint(tmp_path / name)['args'].aikd_teacher == f'hf-hub:org/teacher@{commit}'
        # the branch moves on, a resumed run does not
        save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'other', safe_serialization=True)
        moved = hub.add('org/teacher', tmp_path / 'other')
        for words_more, expected in ((['--resume', tmp_path / 'first/last.pth.tar'], commit), ([], moved)):
            again = command(train_script, image_folder, tmp_path, 'again', '--epochs', '2', *words_more)
            log = run(*again, *aikd('hf-hub:org/teacher'), **online)
            assert f'AI-KD: teacher hf-hub:org/teacher@{expected} at' in log.stdout + log.stderr
            assert 'aikd_teacher was' not in log.stdout + log.stderr
        line = failure(*words, *aikd('hf-hub:org/nobody'), **online)
        assert 'no such repository' in line
    offline = dict(HF_HOME=str(tmp_path / 'cache'), HF_HUB_OFFLINE='1')
    words = command(train_script, image_folder, tmp_path, 'offline', '--epochs', '1')
    run(*words, *aikd('hf-hub:org/teacher@v1'), **offline)
    line = failure(*words, *aikd('hf-hub:org/other'), **offline)
    assert 'HF_HUB_OFFLINE' in line and 'local-dir:' in line


def test_scripts_of_timm_were_given():
    """Loud where they are not: the real thing was then not tested."""
    if not os.environ.get('TIMM_TRAIN_SCRIPTS'):
        pytest.skip('timm\'s own train.py was NOT tested: set TIMM_TRAIN_SCRIPTS (README, "Development")')
    assert all(path.is_file() for path in training_scripts().values())
