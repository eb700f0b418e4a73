#!/usr/bin/env python3
"""A compact training script on timm's factories and tasks, for those who have no clone of timm.

    python train.py --data-dir DATA --model resnet50 --num-classes 10
    torchrun --nproc-per-node 2 train.py --config recipe.yaml --data-dir DATA

Its options are a subset of those of timm's own train.py, with the same names, defaults and meaning; a YAML file given
with --config holds them with underscores. DATA has one folder for each split and in it one for each class, or is
whatever --dataset says. The output folder gets args.yaml, summary.csv and checkpoints, the best as model_best.pth.tar.
"""
import argparse
import difflib
import logging
import os
import shutil
import time
from contextlib import nullcontext
from datetime import datetime
from functools import partial

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

_logger = logging.getLogger('train')
OUTPUT = './output/train'

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with other defaults')
parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], parents=[config_parser])
switch = {'action': 'store_true', 'default': False}

add = parser.add_argument_group('Data').add_argument
add('--data-dir', metavar='DIR', help='root folder of the data set')
add('--dataset', default='', metavar='TYPE/NAME', help='data set of create_dataset (default: image folders)')
add('--train-split', default='train', metavar='NAME', help='what to train on')
add('--val-split', default='validation', metavar='NAME', help='what to validate on; empty: no validation')
add('--dataset-download', **switch, help='let torch/ and tfds/ data sets be downloaded')
add('--class-map', default='', metavar='FILE', help='class names in the order of their indices')
add('-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
add('--no-prefetcher', **switch, help='normalise on the CPU, in the loader processes')

add = parser.add_argument_group('Model').add_argument
add('--model', default='resnet50', metavar='NAME', help='architecture, as create_model knows it')
add('--pretrained', **switch, help='start from the pretrained weights of that name')
add('--initial-checkpoint', default='', metavar='FILE', help='start from these weights')
add('--resume', default='', metavar='FILE', help='continue from this checkpoint of a run; auto: from the last one of '
    '--experiment, if there is one')
add('--num-classes', type=int, metavar='N', help='classes (default: the model\'s)')
add('--gp', metavar='POOL', help='global pooling (default: the model\'s)')
add('--img-size', type=int, metavar='N', help='image size (default: the model\'s)')
add('--in-chans', type=int, metavar='N', help='input channels (default: as --input-size, or 3)')
add('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width (default: the model\'s)')
add('--crop-pct', type=float, metavar='P', help='centre crop for validation (default: the model\'s)')
add('--mean', type=float, nargs='+', metavar='M', help='pixel means (default: the model\'s)')
add('--std', type=float, nargs='+', metavar='S', help='pixel standard deviations (default: the model\'s)')
add('--interpolation', default='', metavar='NAME', help='resizing method (default: the model\'s)')
add('--drop', type=float, default=0., metavar='P', help='dropout')
add('--drop-path', type=float, metavar='P', help='stochastic depth')
add('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='KEY=VALUE', help='for create_model')
add('--grad-checkpointing', **switch, help='recompute activations to save memory')
add('--channels-last', **switch, help='channels-last memory layout')
add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')

add = parser.add_argument_group('Optimisation').add_argument
add('-b', '--batch-size', type=int, default=128, metavar='N', help='samples a process and batch')
add('-vb', '--validation-batch-size', type=int, metavar='N', help='the same in validation (default: as in training)')
add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches an update')
add('--opt', default='sgd', metavar='NAME', help='optimizer')
add('--opt-eps', type=float, metavar='EPS', help='its epsilon')
add('--opt-betas', type=float, nargs='+', metavar='BETA', help='its betas')
add('--opt-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='KEY=VALUE', help='its other options')
add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
add('--weight-decay', type=float, default=2e-5, metavar='W', help='weight decay')
add('--layer-decay', type=float, metavar='D', help='factor on the learning rate from layer to layer, downwards')
add('--clip-grad', type=float, metavar='X', help='clip gradients at this')
add('--clip-mode', default='norm', metavar='MODE', help='norm, value or agc')
add('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base)')
add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at --lr-base-size samples an update')
add('--lr-base-size', type=int, default=256, metavar='N', help='see --lr-base')
add('--lr-base-scale', default='', metavar='HOW', help='linear or sqrt (default: sqrt for ada* and lamb*, else linear)')
add('--sched', default='cosine', metavar='NAME', help='learning rate schedule')
add('--sched-on-updates', **switch, help='step the schedule every update, not every epoch')
add('--epochs', type=int, default=300, metavar='N', help='length of the schedule')
add('--stop-epoch', type=int, metavar='N', help='stop after this many epochs, on the schedule of --epochs')
add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of rising learning rate')
add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='where it rises from')
add('--warmup-prefix', **switch, help='add the warmup to --epochs')
add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr, after --epochs')
add('--min-lr', type=float, default=0, metavar='LR', help='where the schedule ends')
add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of sched multistep')
add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between decays of sched step')
add('--decay-rate', type=float, default=0.1, metavar='X', help='factor of a decay')

add = parser.add_argument_group('Augmentation and loss').add_argument
add('--no-aug', **switch, help='none at all')
add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='S', help='area of the random crop')
add('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='R', help='aspect ratio of the random crop')
add('--hflip', type=float, default=0.5, metavar='P', help='horizontal flips')
add('--vflip', type=float, default=0., metavar='P', help='vertical flips')
add('--color-jitter', type=float, default=0.4, metavar='X', help='strength of colour changes')
add('--aa', metavar='POLICY', help='AutoAugment, RandAugment, AugMix policy')
add('--train-interpolation', default='random', metavar='NAME', help='resizing method in training')
add('--reprob', type=float, default=0., metavar='P', help='random erasing')
add('--remode', default='pixel', metavar='MODE', help='its mode')
add('--recount', type=int, default=1, metavar='N', help='its number of boxes')
add('--mixup', type=float, default=0., metavar='A', help='mixup alpha')
add('--cutmix', type=float, default=0., metavar='A', help='cutmix alpha')
add('--mixup-prob', type=float, default=1., metavar='P', help='how often either is applied')
add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='how often it is cutmix, where both are on')
add('--mixup-mode', default='batch', metavar='MODE', help='batch, pair or elem')
add('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
add('--bce-loss', **switch, help='binary cross-entropy')
add('--bce-sum', **switch, help='its sum over the classes, not their mean')
add('--bce-target-thresh', type=float, metavar='X', help='make its targets 0 or 1 at this threshold')

add = parser.add_argument_group('Moving average of the weights').add_argument
add('--model-ema', **switch, help='keep one, and validate it')
add('--model-ema-decay', type=float, default=0.9998, metavar='X', help='its decay')
add('--model-ema-warmup', **switch, help='start with a smaller decay')

add = parser.add_argument_group('Run').add_argument
add('--device', default='cuda', metavar='NAME', help='where to train')
add('--amp', **switch, help='mixed precision')
add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its lower precision')
add('--seed', type=int, default=42, metavar='N', help='random seed')
add('--log-interval', type=int, default=50, metavar='N', help='updates between two lines of the log')
add('--output', default='', metavar='DIR', help='holds the output folders (default: ./output/train)')
add('--experiment', default='', metavar='NAME', help='the output folder (default: date, model and image size)')
add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
add('--save-epochs', type=int, nargs='+', default=[], metavar='N', help='keep milestone-N.pth.tar of these epochs, too')
add('--val-interval', type=int, default=1, metavar='N', help='epochs from one validation and checkpoint to the next')
add('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='what makes the best checkpoint')
for action in parser._actions:
    if action.default not in (None, '', {}, [], False, argparse.SUPPRESS):
        action.help += ' (default: %(default)s)'


def _parse_args():
    """The arguments, and their text for args.yaml."""
    path = config_parser.parse_known_args()[0].config
    if path:
        try:
            with open(path) as file:
                defaults = dict(yaml.safe_load(file) or {})
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError):
            parser.error(f'--config {path}: not a YAML file of keys and values')
        known = [action.dest for action in parser._actions]
        for key in defaults.keys() - set(known):
            close = difflib.get_close_matches(str(key), known, 1)
            parser.error(f'--config {path}: unknown key {key}' + (f'; did you mean {close[0]}' if close else ''))
        parser.set_defaults(**defaults)
    args = parser.parse_args()
    if not (args.data_dir or args.dataset):
        parser.error('--data-dir is missing')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto: needs --experiment')
    return args, yaml.safe_dump(vars(args))


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    primary = utils.is_primary(args)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    utils.random_seed(args.seed)  # the same weights in every process, of which the moving average starts
    model = build_model(args).to(device)
    utils.random_seed(args.seed, args.rank)  # but different augmentations
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    data_config = resolve_data_config(vars(args), model=model, verbose=primary)
    loader_train, loader_eval, mixup_fn = create_loaders(args, data_config, device)
    if len(loader_train) == 0:
        parser.error(f'--batch-size {args.batch_size}: more than there are training samples for each process')
    task = ClassificationTask(model, create_criterion(args).to(device), device=device, verbose=primary)

    amp_autocast, loss_scaler = nullcontext, None
    if args.amp:
        amp_autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
        if device.type == 'cuda' and args.amp_dtype == 'float16':  # bfloat16 has float32's range, nothing to scale
            loss_scaler = utils.NativeScaler(device=device.type)

    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    if not args.lr:
        args.lr = scaled_lr(args)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)

    start_epoch, resume = 0, resumed_checkpoint(args)
    if resume:
        start_epoch = resume_task_checkpoint(
            task, resume, optimizer=optimizer, loss_scaler=loss_scaler, log_info=primary) or 0
    # The moving average is copied from a bare model, and compiled graphs know nothing of DDP: this order matters.
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if resume:
            load_task_ema_checkpoint(task, resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    eval_models = [('', task.get_eval_model())]
    if args.model_ema:
        eval_models.append((' (EMA)', task.get_eval_model(ema=True)))
    if args.distributed:
        task.prepare_distributed(device_ids=None if device.type == 'cpu' else [device])
    model = task.get_trainable_module()

    eval_metric = args.eval_metric if loader_eval is not None else 'loss'
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch,
    )
    stop_epoch = args.stop_epoch or num_epochs
    if not 0 < stop_epoch <= num_epochs:
        raise ValueError(f'--stop-epoch {stop_epoch}: allowed is 1 to the scheduled epochs, {num_epochs}')
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    saver = output_dir = None
    if primary:
        stamp = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{data_config["input_size"][-1]}'
        output_dir = utils.get_outdir(args.output or OUTPUT, args.experiment or stamp)
        summary = os.path.join(output_dir, 'summary.csv')
        saver = utils.CheckpointSaver(
            model, optimizer, args=args, amp_scaler=loss_scaler, checkpoint_dir=output_dir, recovery_dir=output_dir,
            decreasing=eval_metric == 'loss', max_history=args.checkpoint_hist, task=task)
        if hasattr(utils, 'trim_summary'):  # timm 1.0.31
            utils.trim_summary(summary, start_epoch)
            if args.resume == 'auto' and resume:
                saver.load_state_dict_from_checkpoint(resume)
        with open(os.path.join(output_dir, 'args.yaml'), 'w') as file:
            file.write(args_text)
        _logger.info(
            f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {args.world_size} x {device}; '
            f'{updates_per_epoch} updates an epoch, epochs {start_epoch} to {stop_epoch - 1}, lr {args.lr:g}; '
            f'writing to {output_dir}')

    for epoch in range(start_epoch, stop_epoch):
        if hasattr(loader_train.dataset, 'set_epoch'):
            loader_train.dataset.set_epoch(epoch)
        elif args.distributed and hasattr(loader_train.sampler, 'set_epoch'):
            loader_train.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(
            epoch, model, loader_train, optimizer, args, task=task, device=device, lr_scheduler=lr_scheduler,
            output_dir=output_dir, amp_autocast=amp_autocast, loss_scaler=loss_scaler, mixup_fn=mixup_fn)
        completed, metric = epoch + 1, None
        if completed % args.val_interval == 0 or completed == stop_epoch or completed in args.save_epochs:
            eval_metrics = None
            for suffix, eval_model in eval_models:  # the last one counts
                if args.distributed:  # each process has BatchNorm statistics of its own
                    utils.distribute_bn(eval_model, args.world_size, reduce=True)
                if loader_eval is not None:
                    eval_metrics = validate(
                        eval_model, loader_eval, nn.CrossEntropyLoss(), args, task=task, device=device,
                        amp_autocast=amp_autocast, log_suffix=suffix)
            metric = (eval_metrics or train_metrics)[eval_metric]
            if primary:
                utils.update_summary(
                    epoch, train_metrics, eval_metrics, summary, lr=mean_lr(optimizer),
                    write_header=not os.path.exists(summary) or os.path.getsize(summary) == 0)
                best_metric, best_epoch = saver.save_checkpoint(epoch, metric)
                if completed in args.save_epochs:
                    shutil.copyfile(
                        os.path.join(output_dir, 'last.pth.tar'),
                        os.path.join(output_dir, f'milestone-{completed}.pth.tar'))
                _logger.info(f'Best {eval_metric} so far: {best_metric:.4f} (epoch {best_epoch})')
        if lr_scheduler is not None:
            lr_scheduler.step(completed, metric)
    if args.distributed:
        torch.distributed.destroy_process_group()


def resumed_checkpoint(args):
    """The checkpoint to continue from; empty for a fresh run."""
    if args.resume != 'auto':
        return args.resume
    last = os.path.join(args.output or OUTPUT, args.experiment, 'last.pth.tar')
    return last if os.path.isfile(last) else ''


def build_model(args):
    """The model, with its number of classes noted in `args`."""
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint_path=args.initial_checkpoint,
        num_classes=args.num_classes,
        in_chans=args.in_chans or (args.input_size or [3])[0],
        global_pool=args.gp,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    )
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def create_loaders(args, data_config, device):
    """Loaders for training and validation (None without a split), and the mixup that is left to the training loop."""
    def dataset(split, is_training):
        return create_dataset(
            args.dataset, root=args.data_dir, split=split, is_training=is_training, batch_size=args.batch_size,
            download=args.dataset_download, class_map=args.class_map, seed=args.seed,
            input_img_mode='RGB' if data_config['input_size'][0] == 3 else 'L')

    mixup_fn = collate_fn = None
    if mixing(args):
        mixup_fn = (FastCollateMixup if args.prefetcher else Mixup)(
            args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=args.num_classes)
        if args.prefetcher:
            mixup_fn, collate_fn = None, mixup_fn
    common = {
        'input_size': data_config['input_size'], 'mean': data_config['mean'], 'std': data_config['std'],
        'num_workers': args.workers, 'persistent_workers': args.workers > 0, 'distributed': args.distributed,
        'device': device, 'use_prefetcher': args.prefetcher}
    own = args.no_aug or not args.train_interpolation
    loader_train = create_loader(
        dataset(args.train_split, True), batch_size=args.batch_size, is_training=True, no_aug=args.no_aug,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
        auto_augment=args.aa, re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        interpolation=data_config['interpolation'] if own else args.train_interpolation, collate_fn=collate_fn,
        **common)
    if not args.val_split:
        return loader_train, None, mixup_fn
    loader_eval = create_loader(
        dataset(args.val_split, False), batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'], **common)
    return loader_train, loader_eval, mixup_fn


def mixing(args):
    return args.mixup > 0 or args.cutmix > 0


def create_criterion(args):
    """Mixed targets carry their smoothing already."""
    smoothing = 0. if mixing(args) else args.smoothing
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum)
    if mixing(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def scaled_lr(args):
    """Learning rate for the samples of one update, from what it is at `lr_base_size` samples."""
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def mean_lr(optimizer):
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def train_one_epoch(
        epoch,
        model,
        loader,
        optimizer,
        args,
        task,
        device,
        lr_scheduler=None,
        output_dir=None,  # unused here; plug-ins write beside the checkpoints
        amp_autocast=nullcontext,
        loss_scaler=None,
        mixup_fn=None,
):
    """Train for one epoch; the mean loss over its samples and the processes."""
    model.train()
    optimizer.zero_grad()
    batches, accum_steps = len(loader), args.grad_accum_steps
    updates = -(-batches // accum_steps)
    loss_sum, samples = torch.zeros((), device=device), 0
    start = time.time()
    for index, (input, target) in enumerate(loader):
        update = index // accum_steps
        need_update = index + 1 == batches or (index + 1) % accum_steps == 0
        if not args.prefetcher:
            input, target = input.to(device), target.to(device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if need_update else task.no_sync():
            with amp_autocast():
                loss = task(input, target)['loss']
            loss_sum += loss.detach() * len(input)
            samples += len(input)
            loss = loss / min(accum_steps, batches - update * accum_steps)  # the last update may have fewer batches
            backward(loss, optimizer, args, task, loss_scaler, need_update)
        if not need_update:
            continue
        optimizer.zero_grad()
        task.update_ema(step=epoch * updates + update + 1)
        if utils.is_primary(args) and (update % args.log_interval == 0 or update + 1 == updates):
            _logger.info(
                f'Train: {epoch} [{update + 1}/{updates}]  loss {loss_sum.item() / samples:.4f}  '
                f'lr {mean_lr(optimizer):.2e}  {samples * args.world_size / (time.time() - start):.0f} images/s')
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=epoch * updates + update + 1)
    mean = loss_sum / samples
    return {'loss': (utils.reduce_tensor(mean, args.world_size) if args.distributed else mean).item()}


def backward(loss, optimizer, args, task, loss_scaler, need_update):
    """Add a batch's gradients and, where an update is due, take it."""
    second_order = getattr(optimizer, 'is_second_order', False)
    parameters = None
    if args.clip_grad is not None:
        parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
    if loss_scaler is not None:
        loss_scaler(
            loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
            create_graph=second_order, need_update=need_update)
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


@torch.inference_mode()
def validate(
        model,
        loader,
        loss_fn,
        args,
        task,
        device,
        amp_autocast=nullcontext,
        log_suffix='',
):
    """Metrics of the task's evaluator; in timm before 1.0.31, which has none, loss, top-1 and top-5."""
    model.eval()
    evaluator = None
    if hasattr(task, 'create_evaluator'):
        evaluator = task.create_evaluator(max_samples=getattr(loader.sampler, 'num_valid_samples', None))
    totals = torch.zeros(4, device=device)  # loss, top-1, top-5, samples
    for input, target in loader:
        if not args.prefetcher:
            input, target = input.to(device), target.to(device)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            output = model(input)
            output = output[0] if isinstance(output, (tuple, list)) else output
        if evaluator is not None:
            evaluator.update(output, target)
            continue
        top1, top5 = utils.accuracy(output, target, topk=(1, 5))
        totals += len(target) * torch.stack([loss_fn(output, target), top1, top5, torch.ones_like(top1)])
    if evaluator is not None:
        metrics = evaluator.compute(distributed=args.distributed)
    else:
        if args.distributed:
            torch.distributed.all_reduce(totals)
        metrics = dict(zip(('loss', 'top1', 'top5'), (totals[:3] / totals[3]).tolist(), strict=True))
    if utils.is_primary(args):
        shown = '  '.join(f'{name} {value:.3f}' for name, value in metrics.items())
        _logger.info(f'Validation{log_suffix}: {shown}')
    return metrics


if __name__ == '__main__':
    main()
