"""Whatever a training script can do, AI-KD does right or refuses: a table, each row of it run.

The README's table is made from this one. Each run goes through the script's own main() on a few tiny images, and at
every step the loss is compared with the equations written down again; rows with a `check` look at something more.
`TIMM_TRAIN_SCRIPTS=... pytest tests/test_interactions.py` runs the rows through all of timm's scripts.
"""
import copy
import csv
import importlib.util
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from timm_aikd import autoload, patch
from timm_aikd.run import AikdRun

from .conftest import ROOT, SMALL_RUN, training_scripts, unwatch_parsers

# what the scripts and timm warn of is not ours to fail on
pytestmark = pytest.mark.filterwarnings('ignore')


@dataclass
class Recording:
    """What was seen of a run."""

    run: AikdRun
    steps: list[dict]
    rows: list[dict[str, str]]
    log: str
    files: list[str]  # of the memory
    graphs: list[int]  # compiled so far, at the begin of each epoch and at the end


@dataclass
class Row:
    """One line of the table: what the user gives, what comes of it, and how that is seen."""

    what: str  # as the README shows it
    words: str  # the arguments of the run
    note: str = ''  # of the README; a row without one just works
    refused: str = ''  # the error's words, where the row is one of refusal
    check: Callable[[Recording], bool] = lambda seen: True
    data: str = ''  # the mode of the images, where it is not RGB
    only: str = ''  # what the script or the version of timm must have
    marks: tuple = ()
    test: str = ''  # module and function where the row has a test of its own


class Twin:
    """The equations once more, plainly, beside every step of a run."""

    def __init__(self):
        self.steps: list[dict] = []
        self.past, self.kept, self.graphs = None, {}, []
        self.seen: list[torch.Tensor] = []  # what the student was given last
        self.expected: list[float] = []
        self.backward: list[float] = []  # of what the script took the gradient

    def begin(self, run: AikdRun, epoch: int) -> None:
        self.epoch = epoch
        self.graphs.append(compiled_graphs())
        self.past = copy.deepcopy(run.student).eval() if epoch > 0 else None

    @torch.no_grad()
    def progressive(self, run, input, z, target, binary):
        tau = run.aikd.config.progressive_temperature
        if run.aikd.memory.kind == 'snapshot':
            soft, known = self.past(input).float(), torch.ones(len(z), dtype=torch.bool)
        else:
            index = run._indices.of_batch(len(z)).tolist()
            known = torch.tensor([i in self.kept for i in index])
            soft = torch.stack([self.kept.get(i, torch.zeros(z.shape[-1])) for i in index])
            fresh = z if binary else z.log_softmax(-1)
            self.kept |= dict(zip(index, fresh, strict=True))
        if binary:
            per_class = F.binary_cross_entropy_with_logits(z / tau, torch.sigmoid(soft / tau), reduction='none')
            losses = per_class.sum(-1) if run.aikd.sum_classes else per_class.mean(-1)
        else:
            losses = -(torch.softmax(soft / tau, -1) * torch.log_softmax(z / tau, -1)).sum(-1)
        own = [0. if k else run.criterion(z[i:i + 1], target[i:i + 1]) for i, k in enumerate(known)]
        return (tau ** 2 * losses[known].sum() + sum(own)) / len(z)

    @torch.no_grad()
    def check(self, run: AikdRun, input, output, target, result) -> None:
        aikd, config, z = run.aikd, run.aikd.config, output.detach().float()
        task, binary = run.criterion(output, target), aikd.binary
        alpha = config.alpha * min((self.epoch + 1) / aikd.epochs, 1) if self.epoch else 0.
        progressive = self.progressive(run, input, z, target, binary) if (
            self.past is not None or aikd.memory.kind == 'store') else 0.
        z_t, tau = aikd.teacher(input).float(), config.temperature
        if binary:
            per_class = F.binary_cross_entropy_with_logits(z / tau, torch.sigmoid(z_t / tau), reduction='none')
            kd = tau ** 2 * (per_class.sum(-1) if aikd.sum_classes else per_class.mean(-1)).mean()
        else:
            p = torch.softmax(z_t / tau, -1)
            kd = tau ** 2 * (p * (p.log() - torch.log_softmax(z / tau, -1))).sum(-1).mean()
        vector = torch.log(torch.sigmoid(z)) if binary else torch.log_softmax(z, -1)
        with torch.autocast(z.device.type, enabled=False):
            adv = -torch.log(torch.sigmoid(aikd.discriminator(vector))).mean()
        adv_weight = config.adv_weight * (min(self.epoch / config.adv_warmup, 1) if config.adv_warmup else 1)
        expected = (1 - alpha) * task + alpha * progressive + config.kd_weight * kd + adv_weight * adv
        assert not self.seen or input is self.seen[0], 'another batch than the student\'s'
        self.expected.append(expected.item())
        exact = output.dtype == torch.float32
        torch.testing.assert_close(
            result['loss'].float(), expected.float(), rtol=1e-3 if exact else 2e-2, atol=1e-3 if exact else 1e-2)
        self.steps.append({
            'epoch': self.epoch, 'size': len(z), 'image': input.shape[-1], 'channels': input.shape[1],
            'soft': target.ndim == 2, 'dtype': input.dtype, 'output': output.dtype, 'target': target})


    def check_backward(self) -> None:
        """The script took the gradient of these losses, each divided by its number of accumulated batches."""
        assert len(self.backward) == len(self.expected) > 0
        for ours, expected in zip(self.backward, self.expected, strict=True):
            assert any(ours * batches == pytest.approx(expected, rel=3e-2, abs=1e-2) for batches in (1, 2, 4))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f'script_{path.parent.name.replace(".", "_")}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drive(script: Path, words: list, monkeypatch, caplog, twin: Twin | None = None) -> AikdRun | None:
    """The script's main(), in this process."""
    runs = []

    def loss(self, input, output, target, index=None):
        result = AikdRun_loss(self, input, output, target, index)
        if twin is not None:
            twin.check(self, input, output, target, result)
        return result

    def begin_epoch(self, epoch, *args, **kwargs):
        AikdRun_begin(self, epoch, *args, **kwargs)
        if twin is not None:
            twin.begin(self, epoch)
            if not runs and '--torchcompile' not in words:  # a hook would be compiled
                self.student.register_forward_pre_hook(
                    lambda module, args: twin.seen.__setitem__(slice(None), args) if module.training else None)
        runs[:] = [self]

    def backward(self, *args, **kwargs):
        if twin is not None:
            twin.backward.append(self.item())
        Tensor_backward(self, *args, **kwargs)

    Tensor_backward = torch.Tensor.backward

    AikdRun_loss, AikdRun_begin = AikdRun.loss, AikdRun.begin_epoch
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patched:
        patched.setattr(AikdRun, 'loss', loss)
        patched.setattr(AikdRun, 'begin_epoch', begin_epoch)
        patched.setattr(torch.Tensor, 'backward', backward)
        patched.setattr(sys, 'argv', [str(script), *map(str, words)])
        root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
        hook, globals_ = sys.excepthook, {}
        autoload.watch_parsers()
        try:
            module = load(script)
            globals_ = module.__dict__
            module.main()
        finally:
            unwatch_parsers()
            patch.restore(globals_)
            sys.excepthook, root.handlers[:] = hook, handlers
    return runs[0] if runs else None


def images(folder: Path, mode: str) -> Path:
    """A copy of the image folder in another mode, for other numbers of channels."""
    for path in (folder / 'x').parent.rglob('*.png'):
        target = folder.with_name(f'{folder.name}_{mode}') / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert(mode).save(target)
    return folder.with_name(f'{folder.name}_{mode}')


def all_steps(name, *values):
    return lambda seen: {step[name] for step in seen.steps} == set(values)


def d_is_float32(seen):
    return {p.dtype for p in seen.run.aikd.discriminator.parameters()} == {torch.float32}


def kind(name, reason=''):
    return lambda seen: seen.run.aikd.memory.kind == name and reason in seen.log


def both(*checks):
    return lambda seen: all(check(seen) for check in checks)


def mixed_then_plain(seen):
    """Soft targets of epoch 0 are mixed, those of epoch 1 are one-hot."""
    peaks = {epoch: torch.cat([s['target'] for s in seen.steps if s['epoch'] == epoch]).max(-1).values.min().item()
             for epoch in (0, 1)}
    return peaks[0] < 0.999 and peaks[1] > 0.999


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def compiled_once(epochs):
    """All was compiled within the first epochs, and nothing after; `graphs` begins with the teacher's, for T_c."""
    return lambda seen: seen.graphs[0] < seen.graphs[epochs] == seen.graphs[-1] and len(seen.graphs) == 5


MIX = 'the memory is the snapshot, which like the teacher sees the mixed batch; `--aikd-memory store` is refused'
AMP = 'teacher and snapshot run as the student does, losses in float32, D always in float32'

ROWS = [
    # precision
    Row('`--amp` (bfloat16)', '--amp --amp-dtype bfloat16', AMP, check=both(d_is_float32, all_steps(
        'output', torch.bfloat16))),
    Row('`--amp` (float16)', '--amp --amp-dtype float16', AMP, check=both(d_is_float32, all_steps(
        'output', torch.float16))),
    Row('`--model-dtype bfloat16`', '--model-dtype bfloat16', AMP, check=both(d_is_float32, all_steps(
        'dtype', torch.bfloat16), lambda seen: next(seen.run.aikd.teacher.model.parameters()).dtype == torch.bfloat16)),
    Row('', '--amp --amp-dtype bfloat16 --aikd-memory snapshot', check=kind('snapshot')),
    Row('', '--model-dtype bfloat16 --aikd-memory snapshot', check=lambda seen: next(
        seen.run.aikd.memory.model.parameters()).dtype == torch.bfloat16),
    Row('`--aikd-teacher-dtype`', '--aikd-teacher-dtype bfloat16', check=lambda seen: next(
        seen.run.aikd.teacher.model.parameters()).dtype == torch.bfloat16),
    # batches
    Row('`--grad-accum-steps`', '--grad-accum-steps 4', 'D steps once a micro-batch',
        check=lambda seen: seen.run.aikd.discriminator.get_state()['optimizer']['state'][0]['step'] == 12),
    Row('`--train-img-sizes`', '--train-img-sizes 32 24', 'teachers of a fixed size get the batch resized',
        check=both(all_steps('image', 32, 24), kind('store'))),
    Row('batches that do not divide the data', '-b 7', 'the last one is dropped, as timm does; its samples keep their '
        'own targets until they are seen', check=both(all_steps('size', 7), kind('store'))),
    # targets
    Row('`--smoothing`', '--smoothing 0.1', 'the task loss keeps it'),
    Row('`--mixup`, `--cutmix` (batch, pair, elem)', '--mixup 0.4 --cutmix 1', MIX, check=both(all_steps(
        'soft', True), kind('snapshot', '--mixup 0.4 mixes'))),
    Row('', '--mixup 0.4 --mixup-mode pair', MIX, check=all_steps('soft', True)),
    Row('', '--cutmix 1 --mixup-mode elem', MIX, check=all_steps('soft', True)),
    Row('`--mixup-mode half`', '--mixup 0.4 --mixup-mode half', MIX, check=all_steps('size', 3)),
    Row('`--mixup` with `--no-prefetcher`', '--mixup 0.4 --no-prefetcher', MIX, check=kind('snapshot')),
    Row('`--mixup-off-epoch`', '--mixup 0.4 --mixup-off-epoch 1 -j 0 --no-prefetcher',
        'the memory stays the snapshot', check=mixed_then_plain),
    Row('`--bce-loss`', '--bce-loss --smoothing 0.1', 'kd, progressive and D see C independent probabilities',
        check=lambda seen: seen.run.aikd.binary),
    Row('`--bce-sum`', '--bce-loss --smoothing 0.1 --bce-sum', 'the soft terms sum too',
        check=lambda seen: seen.run.aikd.sum_classes),
    Row('`--bce-target-thresh`', '--bce-loss --mixup 0.4 --bce-target-thresh 0.2', 'for the task loss'),
    Row('`--bce-pos-weight`', '--bce-loss --smoothing 0.1 --bce-pos-weight 2', 'for the task loss'),
    # model
    Row('vision transformers, drop path', '--model test_vit --img-size 32 --drop-path 0.2',
        'a teacher of a fixed size gets the batch resized'),
    Row('`--drop`', '--drop 0.3 --aikd-memory snapshot', 'teacher and snapshot run without'),
    Row('`--channels-last`', '--channels-last'),
    Row('', '--channels-last --aikd-memory snapshot'),
    Row('`--split-bn`', '--split-bn --resplit --reprob 0.5 --aikd-memory snapshot',
        'teacher and snapshot use the main statistics', only='--split-bn'),
    Row('`--grad-checkpointing`', '--grad-checkpointing --aikd-memory snapshot',
        'not in teacher and snapshot, which need no backward',
        check=lambda seen: [model.grad_checkpointing for model in (
            seen.run.student, seen.run.aikd.memory.model, seen.run.aikd.teacher.model)] == [True, False, False]),
    Row('`--head-init-scale`, `--head-init-bias`', '--head-init-scale 0.1 --head-init-bias -2'),
    Row('one input channel', '--in-chans 1 --input-size 1 32 32 --mean 0.4 --std 0.3', 'the teacher must have as many',
        data='L', check=all_steps('channels', 1)),
    Row('four input channels', '--in-chans 4 --input-size 4 32 32 --mean .5 .5 .5 .5 --std .3 .3 .3 .3 '
        '--input-img-mode RGBA', data='RGBA', check=all_steps('channels', 4), only='--input-img-mode'),
    # optimisation
    Row('any optimizer', '--opt sgd --lr 0.01'),
    Row('', '--opt lamb --lr 0.005'),
    Row('second-order optimizers', '--opt adahessian --lr 0.01', 'for the student; for D they are refused'),
    Row('`--clip-grad` (norm, value, agc)', '--clip-grad 1', 'D is not clipped'),
    Row('', '--clip-grad 0.1 --clip-mode value'),
    Row('', '--clip-grad 0.05 --clip-mode agc'),
    Row('`--layer-decay`', '--layer-decay 0.7'),
    Row('`--model-ema`', '--model-ema --model-ema-decay 0.5',
        'the memory is of the trained weights, not of their average; eval_ece and eval_aurc are the average\'s'),
    Row('`--model-ema-force-cpu`', '--model-ema --model-ema-force-cpu', only='--model-ema-force-cpu'),
    # compilation: the student in training and in validation, the teacher, the snapshot
    Row('`--torchcompile`', '--torchcompile aot_eager --epochs 4', 'student, teacher and snapshot are compiled once, '
        'whatever alpha does; losses and D are not', check=compiled_once(1)),
    Row('', '--torchcompile aot_eager --epochs 4 --aikd-memory snapshot --aikd-adv-warmup 3', check=compiled_once(2)),
    Row('', '--torchcompile inductor --epochs 4', check=compiled_once(1), marks=(pytest.mark.slow,)),
    # epochs
    Row('`--sched-on-updates`', '--sched-on-updates'),
    Row('`--warmup-prefix`, `--cooldown-epochs`', '--epochs 2 --warmup-epochs 1 --warmup-prefix --cooldown-epochs 1',
        'alpha grows over all of them', check=lambda seen: seen.run.aikd.epochs == 4 and len(seen.rows) == 4),
    Row('`--val-interval`', '--val-interval 2 --epochs 4', 'the store keeps the file that the last checkpoint names',
        check=lambda seen: len(seen.rows) == 2 and seen.files == ['aikd-memory-1.safetensors',
                                                                  'aikd-memory-3.safetensors'],
        only='--val-interval'),
    Row("`--val-split ''`", "--val-split ''", 'T_c is 1 unless given, and no eval columns',
        check=lambda seen: 'eval_ece' not in seen.rows[0] and 'T_c = 1' in seen.log),
    Row('`--start-epoch`', '--start-epoch 1', 'the store begins empty: the term pauses for one epoch',
        check=lambda seen: seen.rows[0]['epoch'] == '1'),
    # data
    Row('`--no-prefetcher`', '--no-prefetcher', check=kind('store')),
    Row('`-j 0`', '-j 0', 'where timm allows it', check=kind('store'), only='1.0.31'),
    Row('`--use-multi-epochs-loader`', '--use-multi-epochs-loader', 'older versions of timm start it too early for the '
        'store: the snapshot is taken', check=kind('store'), only='1.0.31'),
    Row('`--aa`, `--reprob`, `--color-jitter`', '--aa rand-m5 --reprob 0.3', 'as in PS-KD the store holds the '
        'prediction for another view; the snapshot sees today\'s', check=kind('store')),
    Row('`--dataset torch/...`', '--dataset torch/image_folder --data-dir DATA/train --val-split validation',
        check=kind('store')),
    # rows with a test of their own
    Row('`--dataset wds/...`, `tfds/...`, `hfids/...`', '', 'iterable: the memory is the snapshot',
        test='test_every_way.test_webdataset_shards'),
    Row('data sets with `--aug-repeats`', '', 'copies of a sample on several ranks share a row',
        test='test_scripts.test_loaders_that_the_store_must_follow'),
    Row('spawned and forkserver workers', '', test='test_every_way.test_workers_of_any_start_method'),
    Row('`torchrun`, any number of ranks', '', 'D is the same on all ranks; a batch that is not finite on one rank '
        'skips D\'s step on all; logged parts are means over ranks', test='test_every_way.test_ranks_agree'),
    Row('`--sync-bn`', '', 'teacher and snapshot use their statistics and do not synchronise (SyncBatchNorm itself '
        'needs CUDA: checked in parts)', test='test_every_way.test_sync_batchnorm_in_the_snapshot'),
    Row('float16 with a gradient scaler', '', 'D and its optimizer are not scaled',
        test='test_every_way.test_gradient_scaler'),
    Row('`criterion_kwargs` of timm 1.0.31', '', 'ce, bce, asl and poly', test='test_every_way.test_criterion_kwargs'),
    Row('`--pretrained`', '', test='test_every_way.test_pretrained_student'),
    Row('`--resume` from last, best and recovery', '', 'restores D, its optimizer, T_c and the stored predictions, the '
        'latter where their file is still there; changed options are reported; after a plain run they start fresh',
        test='test_every_way.test_resumes_from'),
    Row('`--no-resume-opt`', '', 'is about the student\'s optimizer: D\'s is restored',
        test='test_every_way.test_resumes_from'),
    Row('changed `--epochs`', '', 'alpha follows the new schedule', test='test_every_way.test_resumes_from'),
    Row('Ctrl-C', '', 'ends the script as without AI-KD', test='test_every_way.test_interrupted'),
    Row('`--log-wandb`', '', 'the same columns as in summary.csv', test='test_every_way.test_wandb'),
    # refusals
    Row('`--aikd-memory store` with `--mixup`, `--cutmix`', '--aikd-memory store --cutmix 1',
        refused='--cutmix 1.0 mixes the samples of a batch; use --aikd-memory snapshot'),
    Row('`--aikd-memory store` with `--dataset wds/`, `tfds/`, `hfids/`', '--aikd-memory store --dataset wds/x',
        refused='--dataset wds/x is an iterable data set'),
    Row('`--kd-model-name`', '--kd-model-name test_resnet', refused='AI-KD has a kd term of its own',
        only='--kd-model-name'),
    Row('`--jsd-loss`, `--aug-splits`', '--aug-splits 3', refused='--aug-splits 3 cannot go with --aikd',
        only='--aug-splits'),
    Row('', '--jsd-loss', refused='--jsd-loss cannot go with --aikd', only='--jsd-loss'),
    Row('`--torchscript`', '--torchscript', refused='use --torchcompile', only='--torchscript'),
    Row('`--naflex-loader`', '--naflex-loader', refused='use a model and loader of fixed-size images',
        only='--naflex-loader'),
]


@pytest.fixture(scope='session')
def teachers(image_folder, tmp_path_factory):
    """Teachers of all the architectures and channels in the table: random weights are enough for the loss."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def teacher(model, channels):
        key = f'{model}-{channels}.pth'
        if key not in made:
            torch.manual_seed(1)
            net = timm.create_model(model, num_classes=3, in_chans=channels)
            torch.save(net.state_dict(), folder / key)
            made[key] = folder / key
        return made[key]

    return teacher


def known_flags(script: Path) -> str:
    return script.read_text() + timm.__version__


@pytest.mark.parametrize('name', list(training_scripts()))
@pytest.mark.parametrize('row', [pytest.param(row, marks=row.marks, id=row.words) for row in ROWS if row.words])
def test_row(row, name, image_folder, teachers, tmp_path, monkeypatch, caplog, capsys):
    script = training_scripts()[name]
    if script is None:
        pytest.skip('timm\'s own scripts: set TIMM_TRAIN_SCRIPTS')
    text = known_flags(script)
    words = shlex.split(row.words.replace('DATA', str(image_folder)))
    absent = [word for word in words if word.startswith('--') and f"'{word}'" not in text and 'aikd' not in word]
    if absent or (row.only and row.only not in text):
        pytest.skip(f'{name} has no {(absent or [row.only])[0]}')
    data = images(image_folder, row.data) if row.data else image_folder
    model = 'test_vit' if 'test_vit' in words else 'test_resnet'
    channels = {'L': 1, 'RGBA': 4}.get(row.data, 3)
    command = [
        '--data-dir', data, *SMALL_RUN, '--output', tmp_path, '--experiment', 'run', '--aikd', '--aikd-teacher',
        teachers(model, channels), '--aikd-disc-hidden', '8', '--aikd-adv-weight', '0.3', *words]
    if row.refused:
        with pytest.raises(SystemExit) as caught:
            drive(script, command, monkeypatch, caplog)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and row.refused in error and len(error) < 300
        assert not (tmp_path / 'run').exists()
        return
    twin = Twin()
    torch._dynamo.reset()
    run = drive(script, command, monkeypatch, caplog, twin)
    with open(tmp_path / 'run/summary.csv') as file:
        rows = list(csv.DictReader(file))
    twin.check_backward()
    assert 'train_aikd_kd' in rows[-1]
    files = sorted(path.name for path in (tmp_path / 'run').glob('aikd-memory-*'))
    assert row.check(Recording(run, twin.steps, rows, caplog.text, files, [*twin.graphs, compiled_graphs()]))


def interactions_table() -> str:
    """The README's table."""
    lines = ['| with | | |', '|---|---|---|']
    for row in ROWS:
        if row.what:
            verdict = 'refused' if row.refused else 'works'
            lines.append(f'| {row.what} | {verdict} | {row.note} |')
    return '\n'.join(lines)


@pytest.mark.parametrize('row', [row for row in ROWS if not row.words], ids=lambda row: row.test)
def test_a_row_without_a_run_has_a_test_of_its_own(row):
    module, _, function = row.test.partition('.')
    assert f'\ndef {function}(' in (ROOT / 'tests' / f'{module}.py').read_text()


def test_the_readme_has_the_table():
    assert interactions_table() in (ROOT / 'README.md').read_text()
