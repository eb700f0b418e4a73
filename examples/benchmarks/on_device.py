"""Steps of whole networks on one device, the methods in turns: what `step.py --device cuda` reports.

Images are made on the device, so that no loader is measured. A method is one entry of `METHODS`: the options that it
gives AI-KD, and how it is built.
"""
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask

from timm_aikd import AikdConfig, AikdTask, RecordFormat, StoreMemory, Teacher, load_teacher

CLASSES, MANY_CLASSES, LR = 1000, 21841, 1e-3
TIMM = 'timm, kd'
CONFIGS = Path(__file__).parent.parent / 'configs'


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    model: str
    batch: int
    size: int = 224
    channels_last: bool = True
    extras: bool = False  # also the methods in EXTRAS
    options: dict = field(default_factory=dict)  # of the model

    def __str__(self):
        return f'{self.model}, {self.size} px, batch {self.batch}'


CASES = [
    Case('resnet50', 256, extras=True),
    Case('vit_small_patch16_224', 256, channels_last=False),
    Case('convnext_tiny', 128),
]
SMALL = [
    Case('test_resnet', 4, 32, extras=True),
    Case('test_vit', 4, 32, channels_last=False, options={'img_size': 32}),
]

METHODS = {  # options of AI-KD; `classes`, `teachers` and `folded` are the benchmark's
    'AI-KD, kd alone': {'alpha': 0., 'adv_weight': 0.},
    'AI-KD, store': {'memory': 'store'},
    'AI-KD, snapshot': {'memory': 'snapshot'},
    'AI-KD, store, two teachers': {'memory': 'store', 'teachers': 2},
    'AI-KD, store, D on features': {'memory': 'store', 'disc_input': 'features'},
}
EXTRAS = {
    'AI-KD, kd alone, teacher not folded': {'alpha': 0., 'adv_weight': 0., 'folded': False},
    'AI-KD, kd alone, 21,841 classes': {'alpha': 0., 'adv_weight': 0., 'classes': MANY_CLASSES},
    'AI-KD, store, 21,841 classes': {'memory': 'store', 'classes': MANY_CLASSES},
}


class Method:
    """Something that takes a training step, and the milliseconds that its steps took."""

    def __init__(self, name: str, step: Callable[[], None], device: torch.device | str = 'cpu'):
        self.name, self.step, self.device = name, step, torch.device(device)
        self.peak = 0.  # GB
        self._times: list = []  # milliseconds, or pairs of events

    def timed_step(self) -> None:
        if self.device.type != 'cuda':
            start = time.perf_counter()
            self.step()
            self._times.append(1000 * (time.perf_counter() - start))
            return
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        self.step()
        events[1].record()
        self._times.append(events)

    @property
    def ms(self) -> list[float]:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
            return [start.elapsed_time(stop) for start, stop in self._times]
        return self._times


def take_turns(methods: list[Method], rounds: int) -> None:
    """One step each a round, in an order that changes from round to round."""
    order = list(methods)
    for method in 2 * methods:
        method.step()
    for _ in range(rounds):
        random.shuffle(order)
        for method in order:
            method.timed_step()


def quartiles(values: list[float], digits: int = 3) -> str:
    """Median, and the two quartiles in brackets."""
    low, middle, high = (f'{value:.{digits}f}' for value in statistics.quantiles(values, n=4))
    return f'{middle} ({low} to {high})'


def ratio(method: Method, *others: Method) -> str:
    """This method's time by the sum of the others', within each round."""
    return quartiles([own / sum(rest) for own, *rest in zip(method.ms, *(other.ms for other in others), strict=True)])


def task_method(
        name: str, task: nn.Module, *batch, index=None, compiled: bool = False, autocast=None, optimizer=None,
        after_backward: Callable[[], None] | None = None) -> Method:
    """Steps of a task on one batch, or on whatever `batch` returns if it is a function."""
    if compiled:
        task.compile()
    optimizer = optimizer or torch.optim.SGD(task.trainable_module.parameters(), lr=LR)
    extra = () if index is None else (index,)
    device = next(task.trainable_module.parameters()).device

    def step() -> None:
        given = batch[0]() if callable(batch[0]) else (*batch, *extra)
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(autocast)):
            loss = task(*given)['loss']
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return Method(name, step, device)


class Bench:
    """The methods on one network, each with a copy of its own."""

    def __init__(self, case: Case, device: torch.device, compiled: bool, folder: str):
        self.case, self.device, self.compiled, self.folder = case, device, compiled, folder
        self.layout = torch.channels_last if case.channels_last else torch.contiguous_format
        input = torch.randn(case.batch, 3, case.size, case.size, device=device)
        self.input = input.contiguous(memory_format=self.layout)
        self.networks: dict[int, nn.Module] = {}

    def network(self, classes: int = CLASSES) -> nn.Module:
        """A new copy of the network with so many classes; all copies have the same weights."""
        if classes not in self.networks:
            torch.manual_seed(0)
            model = timm.create_model(self.case.model, num_classes=classes, **self.case.options)
            timm.models.save_for_hf(
                model, f'{self.folder}/{classes}', safe_serialization=True, model_args=self.case.options)
            self.networks[classes] = model
        return copy.deepcopy(self.networks[classes]).to(self.device).to(memory_format=self.layout)

    @torch.no_grad()
    def target(self, classes: int = CLASSES) -> torch.Tensor:
        """Labels that the teacher gets right: one no better than chance would stop the run."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.network(classes).eval()(self.input).argmax(-1)

    def method(self, name: str, task: nn.Module, classes: int = CLASSES, index=None) -> Method:
        return task_method(
            name, task, self.input, self.target(classes), index=index, compiled=self.compiled, autocast=True)

    def plain(self) -> Method:
        task = ClassificationTask(self.network().train(), nn.CrossEntropyLoss(), device=self.device, verbose=False)
        return self.method('plain', task)

    def timm_kd(self) -> Method:
        task = LogitDistillationTask(
            self.network().train(), self.network().eval(), nn.CrossEntropyLoss(), temperature=2., device=self.device,
            verbose=False)
        return self.method(TIMM, task)

    def forward(self) -> Method:
        teacher = self.network().eval().requires_grad_(False)
        if self.compiled:
            teacher.compile()

        @torch.no_grad()
        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                teacher(self.input)
        return Method('teacher forward', step, self.device)

    def aikd(self, name: str, classes: int = CLASSES, teachers: int = 1, folded: bool = True, **options) -> Method:
        student = self.network(classes).train()
        specs = (f'local-dir:{self.folder}/{classes}',) * teachers
        teacher = load_teacher(specs if teachers > 1 else specs[0], student) if folded else Teacher(
            self.network(classes).eval())
        config = AikdConfig(teacher='given', teacher_temperature=2., **options)
        task = AikdTask(
            student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=2, device=self.device, verbose=False)
        index = None
        if options.get('memory') == 'store':
            index = torch.arange(self.case.batch)
            task.aikd.use_memory(StoreMemory(RecordFormat(classes), len(index), device=self.device))
        method = self.method(name, task, classes, index)
        task.begin_epoch(0)
        method.step()  # the store's first predictions
        task.end_epoch()
        task.begin_epoch(1)
        return method

    def by_hand(self, on_stream: bool) -> Method:
        """kd written out, the teacher on the student's stream or on one of its own."""
        student, teacher, target = self.network().train(), self.network().eval().requires_grad_(False), self.target()
        optimizer = torch.optim.SGD(student.parameters(), lr=LR)
        main = torch.cuda.current_stream()
        side = torch.cuda.Stream() if on_stream else main

        def step() -> None:
            side.wait_stream(main)
            with torch.autocast('cuda', torch.bfloat16):
                with torch.cuda.stream(side), torch.no_grad():
                    soft = (teacher(self.input).float() / 2).log_softmax(-1)
                logits = student(self.input)
                main.wait_stream(side)
                soft.record_stream(main)
                own = (logits.float() / 2).log_softmax(-1)
                loss = F.cross_entropy(logits, target) + 4 * F.kl_div(own, soft, reduction='batchmean', log_target=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return Method(f'kd by hand{", teacher on a side stream" if on_stream else ""}', step, self.device)

    def builders(self) -> dict[str, Callable[[], Method]]:
        """All methods; eager code that compilation does not change is measured eager only."""
        found = {'plain': self.plain, TIMM: self.timm_kd, 'teacher forward': self.forward}
        methods = METHODS | (EXTRAS if self.case.extras else {})
        for name, options in methods.items():
            if not (self.compiled and 'classes' in options):
                found[name] = partial(self.aikd, name, **options)
        if self.device.type == 'cuda' and self.case.extras and not self.compiled:
            found |= {f'by hand {on_stream}': partial(self.by_hand, on_stream) for on_stream in (False, True)}
        return found


def with_peak(build: Callable[[], Method], device: torch.device) -> Method:
    """The method, with the most memory that it and a step of it have taken."""
    if device.type != 'cuda':
        return build()
    before = torch.cuda.memory_allocated(device)
    method = build()
    method.step()
    method.step()
    torch.cuda.reset_peak_memory_stats(device)
    method.step()
    method.peak = 1e-9 * (torch.cuda.max_memory_allocated(device) - before)
    return method


def measure(case: Case, device: torch.device, compiled: bool, rounds: int) -> None:
    """A table of one network."""
    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # or copies with and without hooks would share a graph
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, device, compiled, folder)
        methods = {}
        for build in bench.builders().values():
            method = with_peak(build, device)
            methods[method.name] = method
    take_turns(list(methods.values()), rounds)
    print(f'\n### {case}, {"compiled" if compiled else "eager"}\n')
    print('| method | ms a step | images a second | of timm\'s kd | peak GB |\n|---|---|---|---|---|')
    for name, method in methods.items():
        speed = 1000 * case.batch / statistics.median(method.ms)
        cells = quartiles(method.ms, 2), f'{speed:.0f}', ratio(method, methods[TIMM]), f'{method.peak:.2f}'
        print(f'| {name} | {" | ".join(cells)} |')
    goals(methods)


def goals(methods: dict[str, Method]) -> None:
    """The ratios and differences, within each round, that the goals of cost are about."""
    plain, kd = methods['plain'], methods[TIMM]
    print(f'\n- store, of timm\'s kd (goal 1.02): {ratio(methods["AI-KD, store"], kd)}')
    print(f'- snapshot, of timm\'s kd and a forward (goal 1.02): '
          f'{ratio(methods["AI-KD, snapshot"], kd, methods["teacher forward"])}')
    pairs = {'store beyond kd alone': ('AI-KD, store', 'AI-KD, kd alone'),
             'the same at 21,841 classes': ('AI-KD, store, 21,841 classes', 'AI-KD, kd alone, 21,841 classes'),
             'folding saves': ('AI-KD, kd alone, teacher not folded', 'AI-KD, kd alone'),
             'a side stream saves': ('kd by hand', 'kd by hand, teacher on a side stream')}
    for text, names in pairs.items():
        if all(name in methods for name in names):
            rows = zip(methods[names[0]].ms, methods[names[1]].ms, plain.ms, strict=True)
            print(f'- {text}, % of a plain step: {quartiles([100 * (a - b) / step for a, b, step in rows], 2)}')


# ------------------------------------------------------------ recipes


def recipe_methods(path: Path, device: torch.device, case: Case, batches: int = 5) -> list[Method]:
    """The recipe without and with AI-KD, on a few batches of random images; no pretrained weights are fetched."""
    values = yaml.safe_load(path.read_text())
    options = {'drop_path_rate': values['drop_path']} if 'drop_path' in values else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, device, False, folder)
        bench.network()
        teacher = load_teacher(f'local-dir:{folder}/{CLASSES}', bench.network())
    inputs = [torch.randn_like(bench.input, memory_format=torch.preserve_format) for _ in range(batches)]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        targets = [teacher(input).argmax(-1) for input in inputs]
    config = AikdConfig(**{name.removeprefix('aikd_'): value for name, value in values.items() if 'aikd_' in name})

    def build(with_aikd: bool) -> Method:
        student = timm.create_model(case.model, num_classes=CLASSES, **case.options, **options)
        student = student.to(device).to(memory_format=bench.layout).train()
        arguments = {'device': device, 'verbose': False}
        task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=2, **arguments) \
            if with_aikd else ClassificationTask(student, nn.CrossEntropyLoss(), **arguments)
        if values.get('model_ema'):
            task.setup_ema(decay=values['model_ema_decay'])
        optimizer = create_optimizer_v2(
            student, opt=values['opt'], lr=values['lr'], weight_decay=values['weight_decay'],
            layer_decay=values.get('layer_decay'))
        taken = 0

        def batch() -> tuple:
            nonlocal taken
            place = taken % batches
            taken += 1
            index = torch.arange(place * case.batch, (place + 1) * case.batch)
            return inputs[place], targets[place], *((index,) if with_aikd else ())

        def after_backward() -> None:
            if values.get('clip_grad'):
                nn.utils.clip_grad_norm_(student.parameters(), values['clip_grad'])
            task.update_ema()
        method = task_method(
            'with AI-KD' if with_aikd else 'plain', task, batch, autocast=True, optimizer=optimizer,
            after_backward=after_backward)
        if with_aikd:
            task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), batches * case.batch, device=device))
            for epoch in range(2):
                task.begin_epoch(epoch)
                for _ in range(0 if epoch else batches):
                    method.step()
                if epoch == 0:
                    task.end_epoch()
        return method
    return [with_peak(partial(build, with_aikd), device) for with_aikd in (False, True)]


def measure_recipes(device: torch.device, cases: dict[str, Case], steps: int) -> None:
    """Images a second and memory of the recipes, beside the same recipes without AI-KD."""
    print('\n### Recipes\n')
    print('| recipe | plain, images a second | with AI-KD | price | plain, peak GB | with AI-KD, peak GB |')
    print('|---|---|---|---|---|---|')
    for name, case in cases.items():
        plain, aikd = methods = recipe_methods(CONFIGS / name, device, case)
        take_turns(methods, steps)
        speeds = [f'{1000 * case.batch / statistics.median(method.ms):.0f}' for method in methods]
        print(f'| {name} | {" | ".join(speeds)} | {ratio(aikd, plain)} | {plain.peak:.2f} | {aikd.peak:.2f} |',
              flush=True)


def recipe_cases(small: bool) -> dict[str, Case]:
    """Each recipe's network and batch."""
    found = {}
    for path in sorted(CONFIGS.glob('*.yaml')):
        values = yaml.safe_load(path.read_text())
        last = values.get('channels_last', False)
        stand_in = SMALL[0] if last else SMALL[1]
        found[path.name] = stand_in if small else Case(
            values['model'], values['batch_size'], channels_last=last)
    return found


def report(device: torch.device, rounds: int, budget: float, small: bool) -> None:
    """All tables; those for which `budget` seconds do not suffice are left out, and named."""
    start, left_out = time.perf_counter(), []
    blocks: list[tuple[str, float, Callable[[], None]]] = []  # name, seconds that it may take, work
    for compiled, seconds in ((False, 40), (True, 80)):
        for case in SMALL if small else CASES:
            name = f'{case}, {"compiled" if compiled else "eager"}'
            blocks.append((name, seconds, partial(measure, case, device, compiled, rounds)))
        if not compiled:
            blocks.append(('recipes', 30, partial(measure_recipes, device, recipe_cases(small), 3 if small else 50)))
    for name, seconds, work in blocks:
        if time.perf_counter() - start + seconds > budget:
            left_out.append(name)
            continue
        work()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
    if left_out:
        print(f'\nLeft out, as the {budget:.0f} seconds are over: {"; ".join(left_out)}.')
