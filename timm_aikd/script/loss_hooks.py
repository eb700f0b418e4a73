"""Hooks for scripts without tasks, which call `loss_fn(model(input), target)` (timm up to 1.0.22, legacy_train.py)."""
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..errors import AikdError
from ..run import AikdRun
from ..teacher import Teacher, load_checkpoint
from .arguments import resume_file, resume_folder, scheduled_epochs
from .hooks import Hooks


class LossHooks(Hooks):
    """The script gets a loss of AI-KD's for its `loss_fn`; the state travels in the saver's checkpoints."""

    NEEDED = {'train_one_epoch': {'epoch', 'model', 'loader', 'loss_fn', 'saver'}}
    OPTIONAL = {
        **Hooks.OPTIONAL,
        'create_optimizer_v2': set(),  # to see the model, so that a misfit is found before anything is written
        'resume_checkpoint': set(),  # to say in one line what is wrong with the file
    }
    _model: nn.Module | None = None
    _teacher: Teacher | None = None
    _run: AikdRun | None = None

    def replacements(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().replacements(),
            'create_loader': self.create_loader,
            'create_optimizer_v2': self.create_optimizer_v2,
            'resume_checkpoint': partial(self.resume, 'resume_checkpoint'),
        }

    def create_optimizer_v2(self, *args: Any, **kwargs: Any) -> Any:
        """The script's own optimizer; its model is remembered."""
        self._model = next(iter((*args, *kwargs.values())), None)
        return self.originals['create_optimizer_v2'](*args, **kwargs)

    def create_loader(self, *args: Any, **kwargs: Any) -> Any:
        """The script's own loader; with that of the training images all is known that the teacher must fit."""
        loader = self.splits.create_loader(*args, **kwargs)
        if loader is self.splits.train_loader and self._model is not None and self._teacher is None:
            self._teacher = self.load_teacher(self._model)
        return loader

    def train(self, bound: inspect.BoundArguments) -> Any:
        arguments = bound.arguments
        run = self._run = self._run or self._start(arguments['model'], arguments['loss_fn'], arguments.get('saver'))
        with _last_input(arguments['model']) as inputs:
            arguments['loss_fn'] = lambda output, target: run.loss(inputs[-1], output, target)['loss']
            return self.epoch(run, bound)

    def _start(self, model: nn.Module, loss_fn: Callable[..., Any], saver: Any) -> AikdRun:
        """Do what a task does in newer scripts: build, compile, share D among the ranks, resume, save."""
        args, student = self.args, unwrap_model(model)
        student = getattr(student, '_orig_mod', student)  # unwrap_model of timm 0.9 does not look into compiled models
        teacher = self._teacher or self.load_teacher(student)
        run = AikdRun(
            student, loss_fn, teacher, self.config, scheduled_epochs(args), self.splits.class_names,
            resume_folder(args))
        if getattr(args, 'torchcompile', None):
            run.aikd.compile(backend=args.torchcompile, mode=getattr(args, 'torchcompile_mode', None))
        run.aikd.broadcast()
        self.choose_memory(run, self.splits.train_loader)
        checkpoint = resume_file(args)
        if checkpoint is not None:
            _load_state(run, str(checkpoint))
        if saver is not None:
            _carry_state(saver, run.get_state)
        return run


def _load_state(run: AikdRun, path: str) -> None:
    try:
        checkpoint = load_checkpoint(path)
    except Exception as error:
        raise AikdError(
            f'--resume {path}: holds more than tensors and plain containers, which is never unpickled: resume from a '
            f'checkpoint of this script') from error
    run.load_state(checkpoint.get('task_state') if isinstance(checkpoint, dict) else None)


@contextmanager
def _last_input(model: nn.Module) -> Iterator[list[Any]]:
    """Within, a list of the last batch that the model was given."""
    inputs: list[Any] = []
    handle = model.register_forward_pre_hook(lambda _, args: inputs.__setitem__(slice(None), args[:1]))
    try:
        yield inputs
    finally:
        handle.remove()


def _carry_state(saver: Any, get_state: Callable[[], dict[str, Any]]) -> None:
    """Let a saver that knows no tasks write the state into its checkpoints, where timm keeps a task's."""
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
