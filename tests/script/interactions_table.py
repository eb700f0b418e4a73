"""What a training script can do, and what AI-KD then does: one row each, run by test_interactions.py.

The rows with a name are the table in examples/guides/interactions.md.
"""
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from timm_aikd.run import AikdRun


@dataclass
class Seen:
    """What was seen of a run."""

    run: AikdRun
    steps: list[dict]
    rows: list[dict[str, str]]  # of summary.csv
    log: str
    files: list[str]  # of the memory
    graphs: list[int]  # compiled so far, at the begin of each epoch and at the end


@dataclass
class Row:
    """One line of the table: what the user gives, what comes of it, and how that is seen."""

    what: str  # as the guide shows it; an empty one is a further run of the row above
    words: str  # the arguments of the run
    note: str = ''  # of the guide; a row without one just works
    refused: str = ''  # in the error, where the row is refused
    check: Callable[[Seen], bool] = lambda seen: True
    data: str = ''  # the mode of the images, where it is not RGB
    only: str = ''  # what the script or the version of timm must have
    marks: tuple = ()
    test: str = ''  # file in this folder and function, where the row has a test of its own


def all_steps(name, *values):
    return lambda seen: {step[name] for step in seen.steps} == set(values)


def d_is_float32(seen):
    return {p.dtype for p in seen.run.aikd.discriminator.parameters()} == {torch.float32}


def memory(name, reason=''):
    return lambda seen: seen.run.aikd.memory.name == name and reason in seen.log


def first_teacher(seen):
    return getattr(seen.run.aikd.teacher, 'members', [seen.run.aikd.teacher])[0]


def both(*checks):
    return lambda seen: all(check(seen) for check in checks)


def mixed_then_plain(seen):
    """Soft targets of epoch 0 are mixed, those of epoch 1 are one-hot."""
    peaks = {epoch: torch.cat([s['target'] for s in seen.steps if s['epoch'] == epoch]).max(-1).values.min().item()
             for epoch in (0, 1)}
    return peaks[0] < 0.999 and peaks[1] > 0.999


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
    Row('', '--amp --amp-dtype bfloat16 --aikd-memory snapshot', check=memory('snapshot')),
    Row('', '--model-dtype bfloat16 --aikd-memory snapshot', check=lambda seen: next(
        seen.run.aikd.memory.model.parameters()).dtype == torch.bfloat16),
    Row('`--aikd-teacher-dtype`', '--aikd-teacher-dtype bfloat16', check=lambda seen: next(
        seen.run.aikd.teacher.model.parameters()).dtype == torch.bfloat16),
    # batches
    Row('`--grad-accum-steps`', '--grad-accum-steps 4', 'D steps once a micro-batch',
        check=lambda seen: seen.run.aikd.discriminator.get_state()['optimizer']['state'][0]['step'] == 12),
    Row('`--train-img-sizes`', '--train-img-sizes 32 24', 'teachers of a fixed size get the batch resized',
        check=both(all_steps('image', 32, 24), memory('store'))),
    Row('batches that do not divide the data', '-b 7', 'the last one is dropped, as timm does; its samples keep their '
        'own targets until they are seen', check=both(all_steps('size', 7), memory('store'))),
    # targets
    Row('`--smoothing`', '--smoothing 0.1', 'the task loss keeps it'),
    Row('`--mixup`, `--cutmix` (batch, pair, elem)', '--mixup 0.4 --cutmix 1', MIX, check=both(all_steps(
        'soft', True), memory('snapshot', '--mixup 0.4 mixes'))),
    Row('', '--mixup 0.4 --mixup-mode pair', MIX, check=all_steps('soft', True)),
    Row('', '--cutmix 1 --mixup-mode elem', MIX, check=all_steps('soft', True)),
    Row('`--mixup-mode half`', '--mixup 0.4 --mixup-mode half', MIX, check=all_steps('size', 3)),
    Row('`--mixup` with `--no-prefetcher`', '--mixup 0.4 --no-prefetcher', MIX, check=memory('snapshot')),
    Row('`--mixup-off-epoch`', '--mixup 0.4 --mixup-off-epoch 1 -j 0 --no-prefetcher',
        'the memory stays the snapshot', check=mixed_then_plain),
    Row('`--bce-loss`', '--bce-loss --smoothing 0.1', 'kd, progressive and D see C independent probabilities',
        check=lambda seen: type(seen.run.criterion).__name__ == 'BinaryCrossEntropy'),
    Row('`--bce-sum`', '--bce-loss --smoothing 0.1 --bce-sum', 'the soft terms sum too',
        check=lambda seen: seen.run.criterion.sum_classes),
    Row('`--bce-target-thresh`', '--bce-loss --mixup 0.4 --bce-target-thresh 0.2', 'for the task loss'),
    Row('`--bce-pos-weight`', '--bce-loss --smoothing 0.1 --bce-pos-weight 2', 'for the task loss'),
    # model
    Row('vision transformers, drop path', '--model test_vit --img-size 32 --drop-path 0.2',
        'a teacher of a fixed size gets the batch resized'),
    Row('`--drop`', '--drop 0.3 --aikd-memory snapshot',
        'teacher and snapshot run without; terms on features see the student\'s after dropout'),
    Row('`--channels-last`', '--channels-last'),
    Row('', '--channels-last --aikd-memory snapshot'),
    Row('`--split-bn`', '--split-bn --resplit --reprob 0.5 --aikd-memory snapshot',
        'teacher and snapshot use the main statistics', only='--split-bn'),
    Row('`--grad-checkpointing`', '--grad-checkpointing --aikd-memory snapshot',
        'not in teacher and snapshot, which need no backward',
        check=lambda seen: [model.grad_checkpointing for model in (
            seen.run.student, seen.run.aikd.memory.model, first_teacher(seen).model)] == [True, False, False]),
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
    Row('`--no-prefetcher`', '--no-prefetcher', check=memory('store')),
    Row('`-j 0`', '-j 0', 'where timm allows it', check=memory('store'), only='1.0.31'),
    Row('`--use-multi-epochs-loader`', '--use-multi-epochs-loader', 'older versions of timm start it too early for the '
        'store: the snapshot is taken', check=memory('store'), only='1.0.31'),
    Row('`--aa`, `--reprob`, `--color-jitter`', '--aa rand-m5 --reprob 0.3', 'as in PS-KD the store holds the '
        'prediction for another view; the snapshot sees today\'s', check=memory('store')),
    Row('`--dataset torch/...`', '--dataset torch/image_folder --data-dir DATA/train --val-split validation',
        check=memory('store')),
    # rows with a test of their own
    Row('`--dataset wds/...`, `tfds/...`, `hfids/...`', '', 'iterable: the memory is the snapshot',
        test='test_every_way.py::test_webdataset_shards'),
    Row('data sets with `--aug-repeats`', '', 'copies of a sample on several ranks share a row',
        test='test_scripts.py::test_loaders_that_the_store_must_follow'),
    Row('spawned and forkserver workers', '', test='test_every_way.py::test_workers_of_any_start_method'),
    Row('`torchrun`, any number of ranks', '', 'D is the same on all ranks; a batch that is not finite on one rank '
        'skips D\'s step on all; logged parts are means over ranks', test='test_every_way.py::test_ranks_agree'),
    Row('`--sync-bn`', '', 'teacher and snapshot use their statistics and do not synchronise (SyncBatchNorm itself '
        'needs CUDA: checked in parts)', test='test_every_way.py::test_sync_batchnorm_in_the_snapshot'),
    Row('float16 with a gradient scaler', '', 'D and its optimizer are not scaled',
        test='test_every_way.py::test_gradient_scaler'),
    Row('`criterion_kwargs` of timm 1.0.31', '', 'ce, bce, asl and poly',
        test='test_every_way.py::test_criterion_kwargs'),
    Row('`--pretrained`', '', test='test_every_way.py::test_pretrained_student'),
    Row('`--resume` from last, best and recovery', '', 'restores D, its optimizer, T_c and the stored predictions, the '
        'latter where their file is still there; changed options are reported; after a plain run they start fresh',
        test='test_every_way.py::test_resumes_from'),
    Row('`--no-resume-opt`', '', 'is about the student\'s optimizer: D\'s is restored',
        test='test_every_way.py::test_resumes_from'),
    Row('changed `--epochs`', '', 'alpha follows the new schedule', test='test_every_way.py::test_resumes_from'),
    Row('Ctrl-C', '', 'ends the script as without AI-KD', test='test_every_way.py::test_interrupted'),
    Row('`--log-wandb`', '', 'the same columns as in summary.csv', test='test_every_way.py::test_wandb'),
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
    Row('`--eval-metric ece`, `aurc`', '--eval-metric ece', refused='allowed is loss, top1, top5',
        only='EVAL_METRIC'),
    Row('`--amp-impl apex`', '--amp-impl apex', refused='use --amp-impl native', only='--amp-impl'),
]
