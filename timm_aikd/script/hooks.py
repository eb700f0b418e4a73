"""Hooks that scripts with and without tasks have in common."""
import argparse
import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from timm.data import resolve_data_config

from ..calibration import area_under_risk_coverage, expected_calibration_error
from ..config import AikdConfig
from ..errors import AikdError, one_line
from ..loss import top1
from ..ranks import gather_rows, logger
from ..run import AikdRun
from ..teacher import Teacher, load_teacher
from .arguments import resumed_specs, why_not_store
from .ending import SUPPORTED, Ending
from .splits import Splits, random_streams_kept


class Hooks:
    """Functions that take the place of a script's own, call them, and do AI-KD's part.

    Args:
        originals: The script's own functions by their names.
        args: The script's arguments.
        config: The options among them.
        ending: Is told when no step is due any more.
    """

    # name in the script's globals -> the parameters that AI-KD relies on
    NEEDED: ClassVar[dict[str, set[str]]] = {}
    OPTIONAL: ClassVar[dict[str, set[str]]] = {
        'create_loader': set(),  # to fit T_c on validation images, compare class names, choose the memory early
        'validate': {'loss_fn'},  # for eval_ece and eval_aurc
    }

    def __init__(
            self,
            originals: dict[str, Callable[..., Any]],
            args: argparse.Namespace,
            config: AikdConfig,
            ending: Ending,
    ):
        self.originals, self.args, self.config, self.ending = originals, args, config, ending
        self.splits = Splits(originals.get('create_loader', lambda: None), args)
        if 'validate' not in originals and not hasattr(originals.get('ClassificationTask'), 'create_evaluator'):
            logger.warning('AI-KD: no eval_ece and eval_aurc: validate takes no loss_fn, and timm has no evaluators')

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Name in the script's globals -> what takes its place."""
        return {
            'train_one_epoch': self.train_one_epoch,
            'create_loader': self.splits.create_loader,
            'validate': self.validate,
        }

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """An epoch under AI-KD."""
        bound = inspect.signature(self.originals['train_one_epoch']).bind(*args, **kwargs)
        try:
            return self.train(bound)
        except KeyboardInterrupt:
            self.ending.excuse()  # the script ends as it likes
            raise

    def train(self, bound: inspect.BoundArguments) -> Any:
        """An epoch with these arguments of the script's."""
        raise NotImplementedError

    def epoch(self, run: AikdRun, bound: inspect.BoundArguments) -> Any:
        """The script's epoch between the beginning and the end of AI-KD's."""
        arguments = bound.arguments
        loader = arguments['loader']
        self.calibrate(run)  # where it could not be done earlier
        self.choose_memory(run, loader)  # again, where create_loader could not be watched
        epochs = None
        if arguments.get('num_updates_total'):  # of timm's scheduler
            epochs = arguments['num_updates_total'] // math.ceil(len(loader) / self.args.grad_accum_steps)
        run.begin_epoch(arguments['epoch'], loader, arguments.get('output_dir'), epochs)
        steps = run.aikd.steps
        metrics = self.originals['train_one_epoch'](*bound.args, **bound.kwargs)
        if len(loader) and run.aikd.steps == steps:
            raise AikdError(f'--aikd: an epoch ended without one AI-KD step; supported is {SUPPORTED}')
        self.ending.excuse()
        metrics.update((f'aikd_{name}', value) for name, value in run.end_epoch().items())
        return metrics

    def calibrate(self, run: AikdRun) -> None:
        """Let the teacher answer for validation and training images, if T_c is still to be fitted."""
        if run.aikd.needs_temperature and self.splits.can_calibrate():
            with random_streams_kept():
                run.calibrate(
                    self.splits.calibration_batches(run.student), self.splits.training_batches(run.student))

    def choose_memory(self, run: AikdRun, loader: Any) -> None:
        """Let a run choose its memory, where the training loader is known."""
        if loader is not None:
            run.choose_memory(loader, why_not_store(self.args))

    def load_teacher(self, student: nn.Module) -> Teacher | None:
        """The teacher, its commit noted in the options and in the script's arguments."""
        config = self.config
        if config.teacher is None or not config.has_teacher:
            return None
        data_config = resolve_data_config(vars(self.args), model=student)
        teacher = load_teacher(
            resumed_specs(self.args, config.teachers),
            student=student,
            model_name=config.teacher_model,
            default_model_name=self.args.model,
            dtype=config.teacher_dtype,
            size=config.teacher_size,
            mean=data_config['mean'],
            std=data_config['std'],
            class_names=self.splits.class_names,
            model_args={
                'global_pool': getattr(self.args, 'gp', None),
                'bn_eps': getattr(self.args, 'bn_eps', None),
                'img_size': data_config['input_size'][-2:],
                **(getattr(self.args, 'model_kwargs', None) or {}),
            },
            requested_spec=config.teachers,
            uses_classes=config.uses_classes,
        )
        if teacher is not None:
            self.config = dataclasses.replace(config, teacher=teacher.specs)
            self.args.aikd_teacher = self.config.to_dict()['teacher']  # checkpoints keep the arguments
        return teacher

    def resume(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The script's own resume, its failures in one line."""
        try:
            return self.originals[name](*args, **kwargs)
        except AikdError:
            raise
        except Exception as error:  # of pickle, zip, the file system, or of a state that is another model's
            if 'auto' in (*args, *kwargs.values()):
                raise AikdError('--resume auto: this script does not know it: name a checkpoint') from error
            raise AikdError(
                f'--resume {self.args.resume}: cannot be continued ({type(error).__name__}: {one_line(error)}): resume '
                f'from another checkpoint of this model') from error

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """The script's own validation, and ECE and AURC of the outputs that it computes a loss of."""
        bound = inspect.signature(self.originals['validate']).bind(*args, **kwargs)
        loss_fn = bound.arguments['loss_fn']
        predictions: list[tuple[torch.Tensor, torch.Tensor]] = []

        def recording_loss_fn(output: torch.Tensor, target: torch.Tensor) -> Any:
            predictions.append(top1(output, target))
            return loss_fn(output, target)

        bound.arguments['loss_fn'] = recording_loss_fn
        metrics = self.originals['validate'](*bound.args, **bound.kwargs)
        if predictions:
            confidence, correct = (gather_rows(torch.cat(column)).cpu() for column in zip(*predictions, strict=True))
            metrics['ece'] = expected_calibration_error(confidence, correct)
            metrics['aurc'] = area_under_risk_coverage(confidence, correct)
        return metrics
