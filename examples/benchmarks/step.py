"""What a training step costs, as ratios of one run: AI-KD, timm's distillation and torchdistill on the same batches.

    python examples/benchmarks/step.py [--models resnet18 ...] [--threads 1 2] [--rounds 15] [--compile]
    python examples/benchmarks/step.py --memory | --growth | --epochs 200
    python examples/benchmarks/step.py --device cuda [--budget 300]     # see gpu.sh

Every method has a copy of the student and an SGD; the methods take turns, one step each a round, in an order that
changes from round to round. Printed are medians over the rounds of the ratio within a round, with their quartiles.
`--memory` prints the peak memory of a step, `--growth` what the package adds beyond the forwards as classes, batch and
ranks grow, `--epochs` how a step's time changes over a long training, beside that of timm's own task.
"""
import argparse
import copy
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from on_device import CLASSES, LR, TIMM, Method, quartiles, ratio, report, take_turns, task_method
from timm.task import ClassificationTask, LogitDistillationTask

from timm_aikd import Aikd, AikdConfig, AikdTask, RecordFormat, StoreMemory, Teacher, load_teacher

ONE_PHASE = {'kd_weight': 0., 'alpha': 0., 'adv_weight': 0., 'feature_weight': 1.}
CASES = {  # model -> pixels, batch
    'resnet18': (64, 32),
    'resnet50': (224, 8),
    'convnext_atto': (96, 32),
    'vit_tiny_patch16_224': (224, 16),
}


def aikd_method(
        name: str, student, specs: list[str], input, target, compiled: bool, dtype='float32', **options) -> Method:
    task = AikdTask(
        student, nn.CrossEntropyLoss(), epochs=2, teacher=load_teacher(specs, student, dtype=dtype),
        config=AikdConfig(teacher_temperature=2., **options), verbose=False)
    index = None
    if task.aikd.memory is not None and options.get('memory') == 'store':
        samples = len(target)
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), samples))
        index = torch.arange(samples)
    method = task_method(name, task, input, target, compiled=compiled, index=index)
    if task.aikd.memory is not None:
        task.begin_epoch(0)
        method.step()  # the store's first predictions
        task.end_epoch()
    task.begin_epoch(1)
    return method


def torchdistill_method(student, teacher, input, target) -> Method | None:
    try:
        from torch.utils.data import SequentialSampler, TensorDataset
        from torchdistill.core.distillation import get_distillation_box
    except ImportError:
        return None
    layer = student.pretrained_cfg['classifier']
    loader = {'dataset_id': 'data', 'sampler': {'class_or_func': SequentialSampler, 'kwargs': {}},
              'kwargs': {'batch_size': len(input)}}
    net = {'forward_proc': 'forward_batch_only', 'sequential': [], 'forward_hook': {'input': [], 'output': [layer]}}
    where = {f'{who}_module_{what}': value for who in ('student', 'teacher')
             for what, value in (('path', layer), ('io', 'output'))}
    loss = {'key': 'KDLoss', 'kwargs': {**where, 'temperature': 2., 'alpha': 0.5, 'reduction': 'batchmean'}}
    box = get_distillation_box(copy.deepcopy(teacher), student, {'data': TensorDataset(input, target)}, {
        'num_epochs': 1, 'train_data_loader': loader, 'val_data_loader': loader,
        'teacher': {**net, 'requires_grad': False}, 'student': {**net, 'requires_grad': True},
        'optimizer': {'key': 'SGD', 'kwargs': {'lr': LR}},
        'criterion': {'key': 'WeightedSumLoss', 'kwargs': {'sub_terms': {'kd': {'criterion': loss, 'weight': 1.}}}},
    }, torch.device('cpu'), None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step() -> None:
        box.post_forward_process(box.forward_process(input, target, {}))
    return Method('torchdistill, kd', step)


def builders(model: str, size: int, batch: int, compiled: bool, folder: str) -> dict[str, Callable[[], Method | None]]:
    """How to make each of the methods that are compared; all start from the same weights."""
    torch.manual_seed(0)
    options = {'img_size': size} if 'vit' in model else {}
    student = timm.create_model(model, num_classes=CLASSES, **options)
    timm.models.save_for_hf(student, folder, safe_serialization=True, model_args=options)
    input, target = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    def new() -> nn.Module:
        return copy.deepcopy(student).train()

    def aikd(name: str, teachers: int = 1, **options) -> Method:
        specs = [f'local-dir:{folder}'] * teachers
        return aikd_method(name, new(), specs, input, target, compiled, **options)

    def plain() -> Method:
        task = ClassificationTask(new(), nn.CrossEntropyLoss(), verbose=False)
        return task_method('plain', task, input, target, compiled=compiled)

    def timm_kd() -> Method:
        task = LogitDistillationTask(new(), new().eval(), nn.CrossEntropyLoss(), temperature=2., verbose=False)
        return task_method(TIMM, task, input, target, compiled=compiled)

    def forward() -> Method:
        teacher = new().eval()
        if compiled:
            teacher.compile()

        def step() -> None:
            with torch.no_grad():
                teacher(input)
        return Method('teacher forward', step)

    return {
        'plain': plain,
        TIMM: timm_kd,
        'teacher forward': forward,
        'torchdistill, kd': lambda: None if compiled else torchdistill_method(new(), new().eval(), input, target),
        'AI-KD, kd': partial(aikd, 'AI-KD, kd', alpha=0., adv_weight=0.),
        'AI-KD, store': partial(aikd, 'AI-KD, store', memory='store'),
        'AI-KD, snapshot': partial(aikd, 'AI-KD, snapshot', memory='snapshot'),
        'AI-KD, store, bfloat16 teacher': partial(
            aikd, 'AI-KD, store, bfloat16 teacher', memory='store', dtype='bfloat16'),
        'AI-KD, two teachers': partial(aikd, 'AI-KD, two teachers', teachers=2, memory='store'),
        'AI-KD, D on features': partial(aikd, 'AI-KD, D on features', memory='store', disc_input='features'),
        'AI-KD, one phase': partial(aikd, 'AI-KD, one phase', **ONE_PHASE),
    }


def compare(models: list[str], threads: list[int], rounds: int, compiled: bool) -> None:
    print('| model, pixels, batch | threads | plain, ms | timm\'s kd, of plain | torchdistill\'s kd, of timm\'s | '
          'AI-KD with kd alone | store | store, bfloat16 teacher | store, D on features | feature term alone | '
          'snapshot, of timm\'s kd + a teacher forward | store, two teachers, of the same |')
    print('|' + '---|' * 12)
    for model in models:
        for count in threads:
            torch.set_num_threads(count)
            torch.compiler.reset()
            with tempfile.TemporaryDirectory() as folder:
                built = [build() for build in builders(model, *CASES[model], compiled, folder).values()]
            methods = {method.name: method for method in built if method is not None}
            take_turns(list(methods.values()), rounds)
            plain, kd = methods['plain'], methods[TIMM]
            cells = [ratio(methods[name], kd) if name in methods else '' for name in (
                'torchdistill, kd', 'AI-KD, kd', 'AI-KD, store', 'AI-KD, store, bfloat16 teacher',
                'AI-KD, D on features', 'AI-KD, one phase')]
            cells += [ratio(methods[name], kd, methods['teacher forward']) for name in (
                'AI-KD, snapshot', 'AI-KD, two teachers')]
            size, batch = CASES[model]
            print(f'| {model}, {size} px, {batch} | {count} | {statistics.median(plain.ms):.0f} | '
                  f'{ratio(kd, plain)} | {" | ".join(cells)} |', flush=True)


def peaks(models: list[str]) -> None:
    """Most memory that torch's allocator has given out in a step, each method in a process of its own."""
    print('| model, weights | method | peak MB of a step | over timm, kd | in copies of the weights |')
    print('|---|---|---|---|---|')
    for model in models:
        found = {}
        for name in (TIMM, 'AI-KD, kd', 'AI-KD, store', 'AI-KD, snapshot'):
            queue = multiprocessing.get_context('spawn').SimpleQueue()
            multiprocessing.spawn(_peak, (model, name, queue))
            found[name] = queue.get()
        weights = 4e-6 * sum(tensor.numel() for tensor in timm.create_model(model).state_dict().values())
        for name, peak in found.items():
            more = peak - found[TIMM]
            print(f'| {model}, {weights:.0f} MB | {name} | {peak:.0f} | {more:.1f} | {more / weights:.2f} |')


def _peak(_, model: str, name: str, queue) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            method = builders(model, *CASES[model], False, folder)[name]()
            method.step()
            with torch.profiler.record_function('measured'):
                method.step()
        profile.export_chrome_trace(f'{folder}/trace.json')
        with open(f'{folder}/trace.json') as file:
            events = json.load(file)['traceEvents']
    start = next(event['ts'] for event in events if event['name'] == 'measured')
    queue.put(1e-6 * max(
        event['args']['Total Allocated'] for event in events if event['name'] == '[memory]' and event['ts'] >= start))


def added(classes: int, batch: int, memory: str, rounds: int = 30, **options) -> float:
    """Milliseconds a step that AI-KD adds beyond the forwards: losses, D, memory, bookkeeping, all backwards."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(batch, classes))
    target = torch.randint(classes, (batch,))
    answer = torch.randn(batch, classes) + 9. * F.one_hot(target, classes)  # better than chance, or the run would stop
    teacher = nn.Module()
    teacher.forward = lambda input: answer
    student = nn.Module()
    student.forward = lambda input: answer
    aikd = Aikd(classes, Teacher(teacher), AikdConfig(teacher_temperature=2., memory=memory, **options), epochs=2)
    index = None
    if memory == 'store':
        aikd.use_memory(StoreMemory(RecordFormat(classes), batch))
        index = torch.arange(batch).numpy()

    def loss(with_aikd: bool) -> None:
        task_loss = F.cross_entropy(weight, target)
        (aikd(answer, weight, target, task_loss, index)['loss'] if with_aikd else task_loss).backward()
        weight.grad = None

    for epoch in (0, 1):
        aikd.begin_epoch(epoch, student)
        loss(True)
        if epoch == 0:
            aikd.end_epoch()
    ours, plain = Method('ours', lambda: loss(True)), Method('plain', lambda: loss(False))
    take_turns([ours, plain], rounds)
    return statistics.median(ours.ms) - statistics.median(plain.ms)


def growth(rounds: int) -> None:
    torch.set_num_threads(1)
    print('\nms a step beyond the forwards, one thread\n')
    print('| classes | batch | store | snapshot | kd only |')
    print('|---|---|---|---|---|')
    for classes, batch in ((10, 32), (100, 32), (1000, 8), (1000, 32), (1000, 128), (1000, 512), (21841, 32)):
        cells = [
            added(classes, batch, 'store', rounds), added(classes, batch, 'snapshot', rounds),
            added(classes, batch, 'snapshot', rounds, alpha=0., adv_weight=0.)]
        print(f'| {classes:,} | {batch} | ' + ' | '.join(f'{cell:.2f}' for cell in cells) + ' |', flush=True)
    step = added(CLASSES, 32, 'store', rounds)
    with tempfile.TemporaryDirectory() as folder:
        plain = builders('resnet50', 224, 32, False, folder)['plain']()
    take_turns([plain], 3)
    whole = statistics.median(plain.ms)
    print(f'\n{step:.2f} ms is {100 * step / whole:.2f} % of a resnet50 step at 224 px, batch 32: {whole / 1000:.2f} s')
    print('\nthe same at 1,000 classes and batch 32 a rank, ranks of one host, one thread each\n')
    print('| ranks | store |')
    print('|---|---|')
    for ranks in (1, 2, 4):
        queue = multiprocessing.get_context('spawn').SimpleQueue()
        multiprocessing.spawn(_rank, (ranks, rounds, queue), nprocs=ranks)
        print(f'| {ranks} | {queue.get():.2f} |', flush=True)


def long_run(epochs: int) -> None:
    """Steps of the last 20 epochs by those of the first 20 in which all terms are on; the methods take turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes, batch, steps, part = 100, 16, 10, min(20, epochs // 2)
    student, answer = timm.create_model('test_resnet', num_classes=classes), torch.arange(float(classes))
    teacher = nn.Module()
    teacher.forward = lambda input: input.mean((1, 2, 3))[:, None] + answer
    input, target = torch.randn(steps, batch, 3, 32, 32), torch.full((steps, batch), classes - 1)
    plain = ClassificationTask(copy.deepcopy(student), nn.CrossEntropyLoss(), verbose=False)
    tasks = {'plain': plain} | {f'AI-KD, {memory}': AikdTask(
        copy.deepcopy(student), nn.CrossEntropyLoss(), teacher=Teacher(teacher), verbose=False, epochs=epochs,
        config=AikdConfig(teacher_temperature=2., memory=memory)) for memory in ('store', 'snapshot')}
    tasks['AI-KD, store'].aikd.use_memory(StoreMemory(RecordFormat(classes), steps * batch))
    methods = {}
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(epochs + 1):
            for task in list(tasks.values())[1:]:
                task.begin_epoch(epoch, checkpoint_folder=folder)
            for step in range(steps):
                for name, task in tasks.items():
                    index = torch.arange(batch) + step * batch if name == 'AI-KD, store' else None
                    if (name, step) not in methods:
                        methods[name, step] = task_method(name, task, input[step], target[step], index=index)
                    methods[name, step].timed_step()
            for task in list(tasks.values())[1:]:
                task.end_epoch()
    print(f'{epochs} epochs of {steps} steps, one thread: the last {part} epochs by the first {part}\n')
    print('| method | ms a step at first | at last, of that | the same in steps of plain |\n|---|---|---|---|')
    medians = {}  # of each epoch but the first, which has no progressive term
    for name in tasks:
        times = (methods[name, step].ms[1:] for step in range(steps))
        medians[name] = [statistics.median(epoch) for epoch in zip(*times, strict=True)]
    for name, times in medians.items():
        in_plain = [own / plain for own, plain in zip(times, medians['plain'], strict=True)]
        cells = [
            quartiles([last / first for first, last in zip(each[:part], each[-part:], strict=True)])
            for each in (times, in_plain)]
        print(f'| {name} | {statistics.median(times[:part]):.2f} | {cells[0]} | {cells[1]} |')


def _rank(rank: int, ranks: int, rounds: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method='tcp://127.0.0.1:29577', rank=rank, world_size=ranks)
    milliseconds = added(CLASSES, 32, 'store', rounds)
    if rank == 0:
        queue.put(milliseconds)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', choices=list(CASES), default=list(CASES), help='what to train')
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2], help='threads to compute with')
    parser.add_argument('--rounds', type=int, default=15, help='steps of each method')
    parser.add_argument('--compile', action='store_true', help='with torch.compile')
    parser.add_argument('--memory', action='store_true', help='peak memory instead')
    parser.add_argument('--growth', action='store_true', help='how the costs grow')
    parser.add_argument('--epochs', type=int, help='steps at the begin and the end of so many epochs instead')
    parser.add_argument('--device', help='the report of this device instead, in bfloat16 autocast')
    parser.add_argument('--budget', type=float, default=600., help='seconds after which that report ends')
    parser.add_argument('--small', action='store_true', help='that report on tiny networks: does it run')
    args = parser.parse_args()
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads at most; Python '
          f'{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}\n')
    random.seed(0)
    if args.device:
        report(torch.device(args.device), args.rounds, args.budget, args.small)
    elif args.epochs:
        long_run(args.epochs)
    elif args.growth:
        growth(args.rounds)
    elif args.memory:
        peaks(args.models)
    else:
        compare(args.models, args.threads, args.rounds, args.compile)


if __name__ == '__main__':
    main()
