"""Hooks for scripts that train with a ClassificationTask (timm 1.0.27 and later)."""
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import AikdError
from .arguments import resume_file, resume_folder, scheduled_epochs
from .ending import SUPPORTED
from .hooks import Hooks

if TYPE_CHECKING:
    from ..task import AikdTask


class TaskHooks(Hooks):
    """The script gets an `AikdTask` for its task."""

    NEEDED = {
        'ClassificationTask': set(),
        'train_one_epoch': {'epoch', 'loader', 'task'},
        'resume_task_checkpoint': set(),  # without it a checkpoint would lose AI-KD's state
    }

    _task: 'AikdTask | None' = None

    def replacements(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().replacements(),
            'ClassificationTask': self.create_task,
            'resume_task_checkpoint': partial(self.resume, 'resume_task_checkpoint'),
        }

    def create_task(self, *args: Any, **kwargs: Any) -> 'AikdTask':
        """An `AikdTask` from the arguments of a `ClassificationTask`."""
        from ..task import AikdTask  # a timm without tasks has no place for it

        model = inspect.signature(self.originals['ClassificationTask']).bind(*args, **kwargs).arguments['model']
        teacher = self.load_teacher(model)
        task = AikdTask(
            *args,
            teacher=teacher,
            config=self.config,
            epochs=scheduled_epochs(self.args),
            class_names=self.splits.class_names,
            resume_folder=resume_folder(self.args),
            **kwargs,
        )
        self.choose_memory(task.run, self.splits.train_loader)
        if resume_file(self.args) is None:  # else the checkpoint has T_c
            self.calibrate(task.run)  # before anything is written
        self._task = task
        return task

    def train(self, bound: inspect.BoundArguments) -> Any:
        if self._task is None or self._task is not bound.arguments.get('task'):
            raise AikdError(f'--aikd: this script trains without the task that it was given; supported is {SUPPORTED}')
        return self.epoch(bound.arguments['task'].run, bound)
