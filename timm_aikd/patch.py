"""The only file that touches a training script: the table of seams, and how they are bound and put back."""
import argparse
import atexit
import dataclasses
import inspect
import logging
import math
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import AikdError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from .config import AikdConfig
    from .run import AikdRun
    from .task import AikdTask
    from .teacher import Teacher

SUPPORTED = 'train.py of timm 1.0.27 and later, or without tasks: up to 1.0.22, and legacy_train.py'

# name in the script's globals -> the parameters AI-KD relies on, whether it can do without the name
_Seams = dict[str, tuple[set[str], bool]]
_EITHER: _Seams = {
    'create_loader': (set(), True),  # to fit T_c on validation images, compare class names, choose the memory early
    'validate': ({'loss_fn'}, True),  # for eval_ece and eval_aurc
}
TASK_SEAMS: _Seams = {
    'ClassificationTask': (set(), False),
    'train_one_epoch': ({'epoch', 'loader', 'task'}, False),
    'resume_task_checkpoint': (set(), False),  # without it a checkpoint would lose AI-KD's state
    **_EITHER,
}
# Scripts without tasks call loss_fn(model(input), target).
LOSS_SEAMS: _Seams = {
    'train_one_epoch': ({'epoch', 'model', 'loader', 'loss_fn', 'saver'}, False),
    'create_optimizer_v2': (set(), True),  # to see the model, so that a misfit is found before anything is written
    'resume_checkpoint': (set(), True),  # to say in one line what is wrong with the file
    **_EITHER,
}

_CALIBRATION_IMAGES = 2048

_package_logger = logging.getLogger(__package__)
_patched: dict[int, '_Script'] = {}  # id of a module's globals -> what was bound there


def adopt(parser: argparse.ArgumentParser, script: dict[str, Any]) -> None:
    """Add the options to a script's parser and let its parses decide whether the script is patched.

    Only this parser is changed, not its class: the script may parse again, with or without `--aikd`.
    """
    from .config import AikdConfig

    def parse_known_args(
            self: argparse.ArgumentParser,
            args: Any = None,
            namespace: Any = None,
            *more: Any,
            **kwargs: Any,
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        parsed, rest = type(self).parse_known_args(self, args, namespace, *more, **kwargs)
        restore(script)
        if parsed.aikd not in (True, False):
            self.error(str(AikdError(f'--aikd {parsed.aikd!r}: allowed is true or false, without quotes')))
        if parsed.aikd:
            try:
                apply(script, parsed)
            except AikdError as error:
                self.error(str(error))
        else:
            _warn_of_idle_options(parsed)
            stray = [str(word).partition('=')[0] for word in words if str(word).startswith('--aikd-')]
            if stray:
                self.error(f'{stray[0]} does nothing without --aikd: add --aikd or leave it out')
        return parsed, rest

    parser.parse_known_args = types.MethodType(parse_known_args, parser)  # type: ignore[method-assign]
    AikdConfig.add_arguments(parser)


def apply(script: dict[str, Any], args: argparse.Namespace) -> None:
    """Check what can be checked before anything is built, then bind the seams in a script's globals.

    Raises:
        AikdError: A bad option, a conflict with another one, a teacher that is not there, or a script without the
            seams.
    """
    restore(script)
    _check_seams(script)  # first: the rest needs a timm that has what the seams are about
    from .arguments import check_arguments

    config = check_arguments(args)
    _patched[id(script)] = _Script(script, args, config)


def restore(script: dict[str, Any]) -> None:
    """Put back what `apply` has bound; harmless where nothing is."""
    patched = _patched.pop(id(script), None)
    if patched is not None:
        patched.unbind()


def _warn_of_idle_options(args: argparse.Namespace) -> None:
    """Options from a YAML file that forgot `aikd: true`; a saved args.yaml of a plain run holds defaults only."""
    from .config import AikdConfig

    for name, default in AikdConfig().to_dict().items():
        if getattr(args, f'aikd_{name}', default) != default:
            _package_logger.warning(f'AI-KD: aikd_{name} is set, but aikd is not: this is plain training')
            return


def _seams(script: dict[str, Any]) -> _Seams:
    has_tasks = 'ClassificationTask' in script or 'loss_fn' not in _parameters(script.get('train_one_epoch'))
    return TASK_SEAMS if has_tasks else LOSS_SEAMS


def _check_seams(script: dict[str, Any]) -> None:
    where = script.get('__file__') or script.get('__name__')
    for name, (parameters, optional) in _seams(script).items():
        missing = name not in script or not parameters <= _parameters(script[name])
        if missing and not optional:
            what = f'{name}({", ".join(sorted(parameters))})' if parameters else name
            raise AikdError(f'--aikd: {where} has no {what} to hook into; supported is {SUPPORTED}')


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


class _Script:
    """A training script that runs under AI-KD: what was bound in its globals, and what it has shown so far."""

    def __init__(self, script: dict[str, Any], args: argparse.Namespace, config: 'AikdConfig'):
        self.script, self.args, self.config = script, args, config
        self.task: AikdTask | None = None  # in a script with tasks
        self.run: AikdRun | None = None  # what the task holds, or takes its place
        self.model: nn.Module | None = None  # in a script without tasks
        self.teacher: Teacher | None = None  # there as well
        self.loader: Any = None  # of the training images
        self.class_names: list[str] | None = None
        self.validation: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # how its loader was made
        self.failed = self.interrupted = False
        seams = _seams(script)
        self.has_tasks = seams is TASK_SEAMS
        self.original = {name: script[name] for name in seams if name in script}
        for name in self.original:
            replacement = getattr(self, name, None)
            if replacement is not None and seams[name][0] <= _parameters(script[name]):
                script[name] = replacement
        self.excepthook = sys.excepthook
        sys.excepthook = self._excepthook
        if script.get('__name__') == '__main__' and not hasattr(sys, 'ps1'):  # whose end is not that of a session
            atexit.register(self._check_steps)

    def unbind(self) -> None:
        self.script.update(self.original)
        atexit.unregister(self._check_steps)
        _package_logger.setLevel(logging.NOTSET)
        if sys.excepthook == self._excepthook:
            sys.excepthook = self.excepthook

    # the seams, by the name they replace

    def ClassificationTask(self, *args: Any, **kwargs: Any) -> 'AikdTask':
        from .arguments import scheduled_epochs
        from .task import AikdTask

        arguments = inspect.signature(self.original['ClassificationTask']).bind(*args, **kwargs).arguments
        teacher = self._teacher(arguments['model'], kwargs.get('verbose', True))
        self.task = AikdTask(*args, teacher=teacher, config=self.config, epochs=scheduled_epochs(self.args), **kwargs)
        self._adopt(self.task.run)
        return self.task

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self.original['train_one_epoch']).bind(*args, **kwargs)
        try:
            return self._epoch_with_task(bound) if self.has_tasks else self._epoch_without_task(bound)
        except KeyboardInterrupt:
            self.interrupted = True  # the script ends as it likes
            raise

    def create_optimizer_v2(self, *args: Any, **kwargs: Any) -> Any:
        self.model = next(iter((*args, *kwargs.values())), None)
        return self.original['create_optimizer_v2'](*args, **kwargs)

    def resume_task_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self._resume('resume_task_checkpoint', *args, **kwargs)

    def resume_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self._resume('resume_checkpoint', *args, **kwargs)

    def _resume(self, name: str, *args: Any, **kwargs: Any) -> Any:
        from .hub import one_line

        try:
            return self.original[name](*args, **kwargs)
        except AikdError:
            raise
        except Exception as error:  # of pickle, zip, the file system, or of a state that is another model's
            raise AikdError(
                f'--resume {self.args.resume}: cannot be continued ({type(error).__name__}: {one_line(error)}): resume '
                f'from another checkpoint of this model') from error

    def _epoch_with_task(self, bound: inspect.BoundArguments) -> Any:
        if bound.arguments.get('task') is not self.task or self.task is None:
            raise AikdError(f'--aikd: this script trains without the task that it was given; supported is {SUPPORTED}')
        return self._epoch(self.task.run, bound)

    def _epoch_without_task(self, bound: inspect.BoundArguments) -> Any:
        run = self.run or self._run_without_task(bound.arguments)
        with _last_input(bound.arguments['model']) as inputs:
            bound.arguments['loss_fn'] = lambda output, target: run.loss(inputs[-1], output, target)['loss']
            return self._epoch(run, bound)

    def _epoch(self, run: 'AikdRun', bound: inspect.BoundArguments) -> Any:
        """The script's epoch between the begin and the end of ours."""
        from .arguments import store_obstacle

        arguments = bound.arguments
        loader = arguments['loader']
        if run.aikd.needs_temperature and self.validation is not None:
            with _random_streams_kept():
                run.calibrate(self._calibration_batches())
        if arguments.get('num_updates_total'):  # what timm's scheduler made of --epochs, exactly
            updates = math.ceil(len(loader) / self.args.grad_accum_steps)
            run.aikd.epochs = arguments['num_updates_total'] // updates
        run.choose_memory(loader, store_obstacle(self.args))  # where create_loader could not be watched
        run.begin_epoch(arguments['epoch'], loader, checkpoint_folder=arguments.get('output_dir'))
        steps = run.aikd.steps
        metrics = self.original['train_one_epoch'](*bound.args, **bound.kwargs)
        if len(loader) and run.aikd.steps == steps:
            raise AikdError(f'--aikd: an epoch ended without one AI-KD step; supported is {SUPPORTED}')
        metrics.update((f'aikd_{name}', value) for name, value in run.end_epoch().items())
        return metrics

    @property
    def _is_primary(self) -> bool:
        return getattr(self.args, 'rank', 0) == 0

    def _teacher(self, student: 'nn.Module', verbose: bool) -> 'Teacher | None':
        from timm.data import resolve_data_config

        from .teacher import load_teacher

        if not verbose:
            _package_logger.setLevel(logging.ERROR)  # what concerns all ranks is said by the primary one
        config = self.config
        if config.teacher is None or not config.has_teacher:
            return None
        data_config = resolve_data_config(vars(self.args), model=student)
        teacher = load_teacher(
            _resumed_spec(self.args, config.teacher),
            student=student,
            model_name=config.teacher_model,
            default_model_name=self.args.model,
            dtype=config.teacher_dtype,
            size=config.teacher_size,
            mean=data_config['mean'],
            std=data_config['std'],
            class_names=self.class_names,
        )
        if teacher is not None and teacher.name != config.teacher:
            teacher.given = config.teacher
            self.config = dataclasses.replace(config, teacher=teacher.name)
            self.args.aikd_teacher = teacher.name  # of which the checkpoints tell
        return teacher

    def _adopt(self, run: 'AikdRun') -> None:
        from .arguments import store_obstacle

        self.run = run
        run.class_names = self.class_names
        if self.loader is not None:
            run.choose_memory(self.loader, store_obstacle(self.args))
        if getattr(self.args, 'resume', None):
            run.resume_folder = Path(self.args.resume).parent

    def _run_without_task(self, arguments: dict[str, Any]) -> 'AikdRun':
        """What a task does in newer scripts: build, compile, give all ranks one D, resume, and go into checkpoints."""
        from timm.utils import unwrap_model

        from .arguments import scheduled_epochs
        from .ranks import is_distributed
        from .run import AikdRun
        from .source import load_checkpoint

        args, student = self.args, unwrap_model(arguments['model'])
        student = getattr(student, '_orig_mod', student)  # unwrap_model of timm 0.9 does not look into compiled models
        if self.teacher is None:
            self.teacher = self._teacher(student, self._is_primary)
        run = AikdRun(
            student, arguments['loss_fn'], self.teacher, self.config, scheduled_epochs(args), self._is_primary)
        if getattr(args, 'torchcompile', None):
            run.aikd.compile(backend=args.torchcompile, mode=getattr(args, 'torchcompile_mode', None))
        if is_distributed() and run.aikd.discriminator is not None:
            run.aikd.discriminator.broadcast()
        self._adopt(run)
        if getattr(args, 'resume', None):
            try:
                checkpoint = load_checkpoint(args.resume)
            except Exception as error:
                raise AikdError(
                    f'--resume {args.resume}: holds more than tensors and plain containers, which is never unpickled: '
                    f'resume from a checkpoint of this script') from error
            run.load_state(checkpoint.get('task_state') if isinstance(checkpoint, dict) else None)
        if arguments.get('saver') is not None:
            _carry_state(arguments['saver'], run.get_state)
        return run

    def create_loader(self, *args: Any, **kwargs: Any) -> Any:
        from .classes import data_set_classes

        loader = self.original['create_loader'](*args, **kwargs)
        arguments = inspect.signature(self.original['create_loader']).bind(*args, **kwargs).arguments
        if arguments.get('is_training'):
            self.loader = loader
            self.class_names = data_set_classes(arguments['dataset'])
            if self.model is not None and self.teacher is None:
                self.teacher = self._teacher(self.model, self._is_primary)
        else:
            self.validation = args, kwargs
        return loader

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        from .calibration import area_under_risk_coverage, expected_calibration_error
        from .loss import top1
        from .ranks import gather_rows

        bound = inspect.signature(self.original['validate']).bind(*args, **kwargs)
        loss_fn = bound.arguments['loss_fn']
        predictions: list[tuple[torch.Tensor, torch.Tensor]] = []

        def recording_loss_fn(output: 'torch.Tensor', target: 'torch.Tensor') -> Any:
            predictions.append(top1(output, target))
            return loss_fn(output, target)

        bound.arguments['loss_fn'] = recording_loss_fn
        metrics = self.original['validate'](*bound.args, **bound.kwargs)
        if predictions:
            confidence, correct = (gather_rows(_concatenate(column)).cpu() for column in zip(*predictions, strict=True))
            metrics['ece'] = expected_calibration_error(confidence, correct)
            metrics['aurc'] = area_under_risk_coverage(confidence, correct)
        return metrics

    def _calibration_batches(self) -> Iterator[tuple['torch.Tensor', 'torch.Tensor']]:
        """The script's own loader over validation images spread evenly: many data sets lie class by class."""
        from torch.utils.data import IterableDataset, Subset

        from .ranks import world_size

        assert self.run is not None and self.validation is not None
        args, kwargs = self.validation
        bound = inspect.signature(self.original['create_loader']).bind(*args, **kwargs)
        dataset, left = bound.arguments['dataset'], _CALIBRATION_IMAGES
        if isinstance(dataset, IterableDataset):
            left = math.ceil(left / world_size())
        elif len(dataset) > left:
            bound.arguments['dataset'] = Subset(dataset, [i * len(dataset) // left for i in range(left)])
        bound.arguments['persistent_workers'] = False
        for input, target in self.original['create_loader'](*bound.args, **bound.kwargs):
            if not bound.arguments.get('use_prefetcher', True):
                weight = next(self.run.student.parameters())
                input, target = input.to(weight.device, weight.dtype), target.to(weight.device)
            yield input, target
            left -= len(target)
            if left <= 0:
                return

    # the end of the script

    def _excepthook(
            self,
            kind: type[BaseException],
            error: BaseException,
            traceback: types.TracebackType | None,
    ) -> None:
        self.failed = True
        if isinstance(error, AikdError) and os.environ.get('TIMM_AIKD_TRACEBACK') != '1':
            print(f'error: {error}', file=sys.stderr)
        else:
            self.excepthook(kind, error, traceback)

    def _check_steps(self) -> None:
        if self.failed or self.interrupted or (self.run is not None and self.run.aikd.steps > 0):
            return
        print(
            'error: --aikd was given, but no AI-KD step was ever taken: no epoch was left to train, or the script does '
            f'not train through its train_one_epoch; supported is {SUPPORTED}', file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the only way to fail from here; nothing has been trained


def _resumed_spec(args: argparse.Namespace, spec: str) -> str:
    """The teacher to load: in a run that is resumed the commit that it began with, if the spec is still the same."""
    from .source import load_checkpoint

    if not spec.startswith('hf-hub:') or not os.path.isfile(getattr(args, 'resume', None) or ''):
        return spec
    try:
        state = load_checkpoint(args.resume)['task_state']['aikd']
    except Exception:  # of a run without AI-KD, or not readable: the script will say so
        return spec
    return str(state['config']['teacher']) if state.get('teacher_given') == spec else spec


@contextmanager
def _last_input(model: 'nn.Module') -> Iterator[list[Any]]:
    """Within, a list of the last batch that the model was given."""
    inputs: list[Any] = []
    handle = model.register_forward_pre_hook(lambda _, args: inputs.__setitem__(slice(None), args[:1]))
    try:
        yield inputs
    finally:
        handle.remove()


def _carry_state(saver: Any, get_state: Callable[[], dict[str, Any]]) -> None:
    """Let a saver that knows no tasks write the state into its checkpoints, where timm keeps a task's."""
    import torch

    def carrying(save: Callable[..., Any]) -> Callable[..., Any]:
        def carrying_save(*args: Any, **kwargs: Any) -> Any:
            torch_save = torch.save
            torch.save = lambda checkpoint, *more, **options: torch_save(
                {**checkpoint, 'task_state': get_state()}, *more, **options)
            try:
                return save(*args, **kwargs)
            finally:
                torch.save = torch_save
        return carrying_save

    for name in ('save_checkpoint', 'save_recovery'):
        setattr(saver, name, carrying(getattr(saver, name)))


def _concatenate(tensors: tuple['torch.Tensor', ...]) -> 'torch.Tensor':
    import torch

    return torch.cat(tensors)


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    """Leave the script's random streams where they are: a run and its baseline are to see the same data."""
    import numpy
    import torch

    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):  # nothing random runs on a device here
        yield
    random.setstate(python)
    numpy.random.set_state(numpy_state)
