"""A finished run, read from its output folder."""
import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model

from ..errors import AikdError
from ..state import SavedState
from ..teacher import Checkpoint, TimmModel, build_model

BEST = 'model_best.pth.tar'
METRICS = ('eval_top1', 'eval_top5', 'eval_loss', 'eval_ece', 'eval_aurc')  # columns of summary.csv


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left behind."""
    model: TimmModel  # with the weights that were validated, the moving average's or its own
    model_args: dict[str, Any]  # what `create_model` needs besides the name to build it
    data_config: dict[str, Any]  # size, normalisation, crop and interpolation of its input
    arguments: dict[str, Any]  # of the training script
    epoch: int | None  # that the checkpoint is of
    state: SavedState | None  # None after a plain run
    epochs: list[dict[str, str]]  # rows of summary.csv
    data_set: str  # timm's name for it, or the last part of the folder
    class_names: list[str] | None  # in the order of the model's outputs

    @classmethod
    def read(cls, folder: Path | str, name: str | None = None, model_name: str | None = None) -> 'FinishedRun':
        """From a run's output folder, or from one of the checkpoints in it.

        Args:
            folder: The folder, or the checkpoint.
            name: Of the checkpoint in the folder; None: the best one.
            model_name: The architecture; None: the one that the checkpoint stores.

        Raises:
            AikdError: It is neither, or the checkpoint cannot be read.
        """
        path = _checkpoint_path(Path(folder).expanduser(), name)
        checkpoint = Checkpoint.read(str(path))
        arguments = checkpoint.arguments
        if not arguments.get('model'):
            raise AikdError(f'push {path}: stores no arguments of a training script: give the output folder of a run')
        loaded = build_model(checkpoint, model_name or arguments['model'])
        names = loaded.model.pretrained_cfg['label_names']
        data_folder = arguments.get('data_dir') or arguments.get('data') or ''
        return cls(
            loaded.model, loaded.model_args, loaded.data_config or {}, arguments, checkpoint.rest.get('epoch'),
            SavedState.of_checkpoint(checkpoint.rest), _read_summary(path.parent / 'summary.csv'),
            data_set=arguments.get('dataset') or Path(data_folder).name or 'unknown',
            class_names=names if names and len(names) == loaded.model.num_classes else None)

    @property
    def name(self) -> str:
        """The architecture."""
        return str(self.model.pretrained_cfg['architecture'])

    @property
    def teachers(self) -> list[str]:
        """The teachers' specs; of a local path only the last part."""
        specs = self.state.config.get('teacher') if self.state else None
        specs = [specs] if isinstance(specs, str) else specs or []
        return [public_name(spec) for spec in specs if spec != 'none']

    @property
    def teacher_temperature(self) -> float | None:
        """T_c, fitted or given."""
        if self.state is None:
            return None
        given = self.state.config.get('teacher_temperature')
        return self.state.teacher_temperature or (None if given == 'auto' else given)

    @property
    def uses_average(self) -> bool:
        """Whether the weights are the moving average's."""
        return bool(self.arguments.get('model_ema')) and not self.arguments.get('model_ema_force_cpu')

    @property
    def base_models(self) -> list[str]:
        """Hub repositories that this model comes from: the weights it started from, and its teachers'."""
        start = [self.arguments['model']] if self.arguments.get('pretrained') else []
        found = []
        for spec in [*start, *self.teachers]:
            if spec.startswith(('hf-hub:', 'hf_hub:')):
                found.append(re.split('[:@]', spec)[1])
            elif is_model(spec):
                found.append(getattr(get_pretrained_cfg(spec), 'hf_hub_id', None))
        return list(dict.fromkeys(filter(None, found)))

    def metrics(self) -> dict[str, float]:
        """Validation metrics of the checkpoint's epoch; empty where the run had no validation."""
        rows = [row for row in self.epochs if row.get('epoch') == str(self.epoch)][-1:]
        return {name: float(row[name]) for row in rows for name in METRICS if row.get(name)}


def is_public(spec: str) -> bool:
    """Whether others can load it: a model of the Hub or of timm."""
    return spec.startswith(('hf-hub:', 'hf_hub:')) or bool(is_model(spec))


def public_name(spec: str) -> str:
    """Hub and timm specs unchanged; local paths reduced to their last part."""
    return spec if is_public(spec) else Path(spec.removeprefix('local-dir:')).name


def _checkpoint_path(folder: Path, name: str | None) -> Path:
    if os.path.isfile(folder):  # as Path.is_file, which raises for a name that is too long
        if name is not None:
            raise AikdError(f'--checkpoint {name}: {folder} is a checkpoint already: leave one of them out')
        return folder
    path = folder / (name or BEST)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(folder):
        raise AikdError(f'push {folder}: no such file or folder: give the output folder of a run or a checkpoint')
    kept = sorted(file.name for file in folder.glob('*.pth.tar'))
    remedy = f'it has {", ".join(kept[:3])}: choose with --checkpoint' if kept else 'give the output folder of a run'
    raise AikdError(f'push {folder}: has no {path.name}; {remedy}')


def _read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of summary.csv. A resumed run writes a header again; the last row of an epoch counts."""
    rows: dict[str, dict[str, str]] = {}
    header: list[str] = []
    if path.is_file():
        with open(path, newline='') as file:
            for cells in csv.reader(file):
                if cells[:1] == ['epoch']:
                    header = cells
                elif cells:
                    rows[cells[0]] = dict(zip(header, cells, strict=False))
    return list(rows.values())
