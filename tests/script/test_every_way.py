"""Ways to train that need more than one run of a script: ranks, resumes, interruptions, other data and processes."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from timm_aikd import AikdConfig, AikdTask, SnapshotMemory
from timm_aikd.terms import Distillation

from ..conftest import ROOT, WITHOUT_TASKS, run, training_scripts
from .test_scripts import aikd, checkpoint, command, phase1, summary  # noqa: F401

RANKS = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node')

# A script without tasks names the CPU to DDP, which refuses; this one does not, and may spoil a batch of one rank.
LAUNCHER = '''
import os, sys
import torch
import torch.nn.parallel as parallel
from timm_aikd.script.launch import run_script
ddp = parallel.DistributedDataParallel
parallel.DistributedDataParallel = lambda model, device_ids=None, **more: ddp(model, **more)
if os.environ.get('SPOIL') == os.environ.get('RANK', '0'):
    from timm_aikd import Aikd
    forward, calls = Aikd.forward, []
    def spoilt(self, input, logits, *more):
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                logits[0] = torch.nan
        return forward(self, input, logits, *more)
    Aikd.forward = spoilt
if os.environ.get('SHOW_D'):
    from timm_aikd.run import AikdRun
    end_epoch = AikdRun.end_epoch
    def shown(self):
        metrics = end_epoch(self)
        weights = torch.cat([p.detach().flatten() for p in self.aikd.discriminator.parameters()])
        torch.save((weights, metrics), os.environ['SHOW_D'] + os.environ['RANK'])
        return metrics
    AikdRun.end_epoch = shown
run_script(sys.argv[1], sys.argv[2:])
'''


@pytest.fixture
def launcher(tmp_path):
    path = tmp_path / 'launcher.py'
    path.write_text(LAUNCHER)
    return path


@pytest.mark.parametrize('ranks, spoil', [(2, None), (2, '1'), pytest.param(4, None, marks=pytest.mark.slow)])
def test_ranks_agree(train_script, image_folder, phase1, tmp_path, launcher, ranks, spoil):  # noqa: F811
    """D is the same on all ranks, nobody hangs on a batch that is not finite, and metrics are of all ranks."""
    if ranks == 4 and train_script.parent.name != 'examples':
        pytest.skip('four ranks are run with one script')
    run(*RANKS, str(ranks), launcher, *command(
        train_script, image_folder, tmp_path, 'student', *aikd(phase1), '-b', '3', '--clip-grad', '1'),
        SHOW_D=str(tmp_path / 'shown'), SPOIL=spoil, GLOO_SOCKET_IFNAME='lo')
    shown = [torch.load(tmp_path / f'shown{rank}', weights_only=False) for rank in range(ranks)]
    weights, metrics = shown[0]
    assert weights.isfinite().all()
    for other, others_metrics in shown[1:]:
        assert torch.equal(weights, other) and str(metrics) == str(others_metrics)
    rows = summary(tmp_path / 'student')
    # without a gradient scaler the student itself is not finite from then on, on all ranks
    assert float(rows[0]['train_aikd_disc_skipped']) == (5 if spoil else 0)
    assert rows[1]['train_aikd_disc'] == str(metrics['disc'])


@pytest.mark.parametrize('what', ['last', 'model_best', 'recovery', 'no_resume_opt', 'epochs'])
def test_resumes_from(train_script, image_folder, phase1, tmp_path, what):  # noqa: F811
    words = command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--epochs', '3')
    recovery = ['--recovery-interval', '4'] if what == 'recovery' else []
    if recovery and '--recovery-interval' not in train_script.read_text():
        pytest.skip('the script writes no recovery checkpoints')
    if what == 'no_resume_opt' and '--no-resume-opt' not in train_script.read_text():
        pytest.skip('the script has no --no-resume-opt')
    run(*words, *recovery)
    folder = tmp_path / 'student'
    name = {'model_best': 'model_best', 'recovery': 'recovery-2-3'}.get(what, 'last')
    saved = checkpoint(folder, name)
    more = {'no_resume_opt': ['--no-resume-opt'], 'epochs': ['--epochs', '7']}.get(what, [])
    done = run(*command(
        train_script, image_folder, tmp_path, 'resumed', *aikd(phase1), '--epochs', '5', '--resume',
        folder / f'{name}.pth.tar', *more))
    log, state = done.stdout + done.stderr, saved['task_state']['aikd']
    steps = state['discriminator']['optimizer']['state'][0]['step'].item()
    again = checkpoint(tmp_path / 'resumed')['task_state']['aikd']
    epochs = {'epochs': 7}.get(what, 5) - saved['epoch'] - 1
    assert again['discriminator']['optimizer']['state'][0]['step'].item() == steps + 6 * epochs
    assert again['teacher_temperature'] == state['teacher_temperature']
    kept = state['memory'] is not None and (folder / state['memory']['name']).is_file()
    if what != 'model_best':  # whose file may be long gone
        assert kept and state['memory']['epoch'] == (saved['epoch'] - 1 if what == 'recovery' else saved['epoch'])
    expected = f'prediction memory of epoch {state["memory"]["epoch"]} restored' if kept else 'pauses for one epoch'
    assert expected in log
    alpha = AikdConfig().alpha * (saved['epoch'] + 2) / {'epochs': 7}.get(what, 5)
    assert float(summary(tmp_path / 'resumed')[0]['train_aikd_alpha']) == pytest.approx(alpha)


def test_interrupted(train_script, image_folder, phase1, tmp_path):  # noqa: F811
    """Ctrl-C in the middle of training: the script ends as it does without AI-KD, and the run can be resumed."""
    words = command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--epochs', '300', '-j', '1')
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    last = tmp_path / 'student/checkpoint-1.pth.tar'
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    log, _ = process.communicate(timeout=60)
    if train_script.parent.name == 'examples':
        assert process.returncode != 0 and 'KeyboardInterrupt' in log
    else:
        assert process.returncode == 0 and 'Best metric' in log
    assert 'no AI-KD step' not in log
    epoch = checkpoint(tmp_path / 'student')['epoch']
    done = run(*words, '--epochs', str(epoch + 2), '--resume', tmp_path / 'student/last.pth.tar')
    assert f'prediction memory of epoch {epoch} restored' in done.stdout + done.stderr


def test_wandb(train_script, image_folder, phase1, tmp_path):  # noqa: F811
    """A stand-in for wandb records what the script logs: the columns of summary.csv."""
    if '--log-wandb' not in train_script.read_text():
        pytest.skip('the script knows no wandb')
    (tmp_path / 'stand-in').mkdir()
    (tmp_path / 'stand-in/wandb.py').write_text(
        'import csv, os\ndef init(**kwargs): pass\n'
        'def log(row):\n    print(*row, sep=",", file=open(os.environ["WANDB_FILE"], "a"))\n')
    run(*command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--log-wandb'),
        PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}/stand-in', WANDB_FILE=str(tmp_path / 'logged'))
    logged = [line.split(',') for line in (tmp_path / 'logged').read_text().splitlines()]
    assert len(logged) == 2 and logged[0] == logged[1] == list(summary(tmp_path / 'student')[0])
    assert 'train_aikd_progressive' in logged[0] and 'eval_ece' in logged[0]


@pytest.mark.parametrize('method', ['spawn', pytest.param('forkserver', marks=pytest.mark.slow)])
def test_workers_of_any_start_method(train_script, image_folder, phase1, tmp_path, method):  # noqa: F811
    """Workers import the script afresh, without the patch: nothing in the data path may need it."""
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(
        f'import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n')
    run(*command(train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--aikd-memory', 'store', '-j', '1'),
        PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}/site')
    assert float(summary(tmp_path / 'student')[1]['train_aikd_progressive']) > 0


def test_webdataset_shards(train_script, image_folder, phase1, tmp_path):  # noqa: F811
    webdataset = pytest.importorskip('webdataset')
    for split in ('train', 'validation'):
        with webdataset.TarWriter(str(tmp_path / f'{split}-0000.tar')) as shard:
            for number, path in enumerate(sorted((image_folder / split).rglob('*.png'))):
                shard.write({'__key__': f'{number:04d}', 'png': path.read_bytes(), 'cls': int(path.parent.name[-1])})
    words = command(train_script, tmp_path, tmp_path, 'student', *aikd(phase1), '--dataset', 'wds/shards')
    splits = [f'{split}-{{0000..0000}}.tar' for split in ('train', 'validation')]
    done = run(
        *words, '--train-split', splits[0], '--val-split', splits[1], '--train-num-samples', '36', '--val-num-samples',
        '36') if '--train-num-samples' in train_script.read_text() else pytest.skip('the script cannot count shards')
    log = done.stdout + done.stderr
    assert 'not store, because --dataset wds/shards is an iterable data set' in log
    assert float(summary(tmp_path / 'student')[1]['train_aikd_progressive']) > 0


def test_pretrained_student(train_script, image_folder, phase1, tmp_path):  # noqa: F811
    """A student that starts from weights; timm gets them from a file here, there is no Hub."""
    if '--pretrained-path' not in train_script.read_text():
        pytest.skip('the script has no --pretrained-path')
    run(*command(
        train_script, image_folder, tmp_path, 'student', *aikd(phase1), '--pretrained', '--pretrained-path',
        phase1 / 'model_best.pth.tar', '--lr', '1e-8', '--epochs', '1'))
    row, = summary(tmp_path / 'student')
    best = max(float(row['eval_top1']) for row in summary(phase1))
    assert float(row['eval_top1']) == pytest.approx(best) and float(row['train_aikd_kd']) >= 0


def small_task(criterion, **options):
    torch.manual_seed(0)
    model, teacher = (timm.create_model('test_resnet', num_classes=4) for _ in range(2))
    config = AikdConfig(teacher='given', teacher_temperature=1., disc_hidden=(8,))
    return AikdTask(model, criterion, teacher=teacher, config=config, epochs=3, verbose=False, **options)


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='torch.amp.GradScaler')
@pytest.mark.filterwarnings('ignore')
def test_gradient_scaler():
    """GradScaler's paths emulated on CPU: an overflow skips the student's step, D goes on, float32 and unscaled."""
    task = small_task(nn.CrossEntropyLoss())
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10, growth_interval=1000)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
    plain = small_task(nn.CrossEntropyLoss())
    plain_optimizer = torch.optim.SGD(plain.trainable_module.parameters(), lr=0.01)
    for epoch in range(2):
        for each in (task, plain):
            each.begin_epoch(epoch)
        for _ in range(3):
            x, y = torch.randn(6, 3, 32, 32), torch.randint(0, 4, (6,))
            scaler.scale(task(x, y)['loss']).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            plain(x, y)['loss'].backward()
            plain_optimizer.step()
            for each in (optimizer, plain_optimizer):
                each.zero_grad()
    for ours, theirs in zip(task.aikd.discriminator.parameters(), plain.aikd.discriminator.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    before = [p.clone() for p in task.trainable_module.parameters()]
    scaler.scale(task(x, y)['loss'] * torch.inf).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(task.trainable_module.parameters(), before, strict=True))
    assert task.end_epoch()['disc_skipped'] == 0


@pytest.mark.skipif(not hasattr(timm.loss, 'create_classification_loss'), reason='timm before 1.0.31')
@pytest.mark.parametrize('kwargs, binary', [
    (dict(smoothing=0.1), False), (dict(loss_type='bce', bce_sum=True), True), (dict(loss_type='asl'), False),
    (dict(loss_type='poly', smoothing=0.1), False), (dict(loss_type='bce', class_weight=2., pos_weight=3.), True),
])
def test_criterion_kwargs(kwargs, binary):
    """A criterion that the task builds itself: its own loss stays what it is, BCE is known by its class."""
    task = small_task(None, criterion_kwargs=kwargs)
    assert task.run.binary == binary
    if binary:
        kd, = (term for term in task.aikd.terms if isinstance(term, Distillation))
        assert kd.soft_loss.keywords == {'sum_classes': kwargs.get('bce_sum', False)}
    for epoch in range(2):
        task.begin_epoch(epoch)
        x, y = torch.randn(6, 3, 32, 32), torch.randint(0, 4, (6,))
        result = task(x, y)
        expected = timm.loss.create_classification_loss(**kwargs)(result['output'], y)
        torch.testing.assert_close(result['task_loss'], expected.detach())
    result['loss'].backward()


@pytest.mark.filterwarnings('ignore')
def test_sync_batchnorm_in_the_snapshot():
    """SyncBatchNorm only works on CUDA in training; the snapshot is in eval mode, where it is plain BatchNorm."""
    from timm.layers import convert_sync_batchnorm

    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=4)
    x = torch.randn(4, 3, 32, 32)
    student.train()(x)  # moves the statistics
    expected = student.eval()(x)
    synced = convert_sync_batchnorm(student.train())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    memory = SnapshotMemory()
    memory.remember(synced)
    torch.testing.assert_close(memory(x), expected)


@pytest.mark.parametrize('criterion', [LabelSmoothingCrossEntropy(0.1), BinaryCrossEntropy()])
def test_a_batch_of_one_sample(criterion):
    task = small_task(criterion)
    losses = []
    for epoch in range(2):
        task.begin_epoch(epoch)
        result = task(torch.randn(1, 3, 64, 64), torch.tensor([2]))
        result['loss'].backward()
        losses.append(result['loss'].item())
    assert np.isfinite(losses).all() and np.isfinite(list(task.end_epoch().values())).all()


def test_scripts_without_tasks_train_as_those_with(image_folder, phase1, tmp_path):  # noqa: F811
    """The same method through loss_fn: metrics and D's weights equal those of a script with tasks, bit for bit."""
    scripts = training_scripts()
    if scripts['newest'] is None:
        pytest.skip('timm\'s own scripts: set TIMM_TRAIN_SCRIPTS')
    results = []
    for name in ('newest', *WITHOUT_TASKS):
        run(*command(scripts[name], image_folder, tmp_path, name, *aikd(phase1), '--grad-accum-steps', '4'))
        state = checkpoint(tmp_path / name)
        results.append((summary(tmp_path / name), state['task_state']['aikd']['discriminator']['weights'],
                        state['state_dict']))
    for rows, weights, student in results[1:]:
        assert rows == results[0][0]
        for ours, theirs in ((weights, results[0][1]), (student, results[0][2])):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


