"""A finished run -> a model folder for the Hugging Face Hub, with its card: `timm-aikd push`."""
import argparse
import csv
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from timm.models import create_model, get_pretrained_cfg, is_model, save_for_hf

from . import AikdError, __version__
from .aikd import check_state
from .source import TimmModel, build, load_checkpoint, read_checkpoint

METRICS = {  # column of summary.csv -> type in the card's metadata, name in its table
    'eval_top1': ('accuracy', 'top-1 %'),
    'eval_top5': ('top-5-accuracy', 'top-5 %'),
    'eval_loss': ('nll', 'NLL'),
    'eval_ece': ('ece', 'ECE % (15 bins)'),
    'eval_aurc': ('aurc', 'AURC x 1000'),
}
RECIPE = (  # arguments of timm's scripts that a reader of the card wants to know, where they are set
    'model', 'pretrained', 'initial_checkpoint', 'epochs', 'warmup_epochs', 'cooldown_epochs', 'batch_size',
    'grad_accum_steps', 'world_size', 'opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay', 'lr',
    'lr_base', 'lr_base_size', 'lr_base_scale', 'sched', 'min_lr', 'warmup_lr', 'clip_grad', 'clip_mode', 'no_aug',
    'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'aug_repeats', 'reprob', 'remode', 'mixup', 'cutmix',
    'mixup_mode', 'smoothing', 'bce_loss', 'bce_sum', 'bce_target_thresh', 'drop', 'drop_path', 'head_init_scale',
    'model_ema', 'model_ema_decay', 'amp', 'amp_dtype', 'model_dtype', 'torchcompile',
)
CITATION = """```bibtex
@article{kim2024aikd,
  title   = {AI-KD: Adversarial learning and Implicit regularization for self-Knowledge Distillation},
  author  = {Kim, Hyungmin and Suh, Sungho and Baek, Sunghyun and Kim, Daehwan and Jeong, Daun and Cho, Hansang and
             Kim, Junmo},
  journal = {Knowledge-Based Systems},
  volume  = {293},
  year    = {2024},
  note    = {arXiv:2211.10938}
}
```"""
_REPOSITORY = re.compile(r'(hf-hub:)?([\w][\w.-]*/[\w][\w.-]*)')


@dataclass
class FinishedRun:
    """What a run has left behind.

    Args:
        model: With the weights of one of its checkpoints, the moving average's if these were validated.
        model_args: What `create_model` needs besides the name to build it.
        data_config: How its input was prepared: size, normalisation, crop, interpolation.
        arguments: Of the training script.
        epoch: That the checkpoint is of.
        state: AI-KD's part of the checkpoint, empty after a plain run.
        epochs: Rows of summary.csv.
        class_names: In the order of the model's outputs, where they are known.
    """
    model: TimmModel
    model_args: dict[str, Any]
    data_config: dict[str, Any]
    arguments: dict[str, Any]
    epoch: int | None
    state: dict[str, Any]
    epochs: list[dict[str, str]]
    class_names: list[str] | None

    @classmethod
    def read(cls, folder: Path | str, checkpoint: str = 'model_best.pth.tar') -> 'FinishedRun':
        """From a run's output folder.

        Raises:
            AikdError: It is not such a folder, or its checkpoint cannot be read.
        """
        path = Path(folder) / checkpoint
        if not os.path.isfile(path):
            kept = sorted(file.name for file in Path(folder).glob('*.pth.tar')) if os.path.isdir(folder) else []
            has = f'its checkpoints are {", ".join(kept[:3])}: choose with --checkpoint' if kept else (
                'give the output folder of a run' if os.path.isdir(folder) else 'no such folder')
            raise AikdError(f'push {folder}: has no {checkpoint}; {has}')
        weights, arguments = read_checkpoint(str(path))
        if not arguments.get('model'):
            raise AikdError(f'push {path}: tells no arguments of a training script: give the output folder of a run')
        model, model_args, data_config = build(str(path), weights, arguments)
        saved = load_checkpoint(str(path))
        task_state = saved.get('task_state')
        state = task_state.get('aikd') if isinstance(task_state, dict) else None
        if state is not None:
            check_state(state)
        return cls(
            model, model_args, data_config, arguments, saved.get('epoch'), state or {},
            _read_summary(path.parent / 'summary.csv'), model.pretrained_cfg['label_names'])

    @property
    def name(self) -> str:
        """The architecture."""
        return str(self.model.pretrained_cfg['architecture'])

    @property
    def data_set(self) -> str:
        """What the data set is called: timm's name for it or the last part of the folder."""
        folder = self.arguments.get('data_dir') or self.arguments.get('data') or ''
        return self.arguments.get('dataset') or Path(folder).name or 'unknown'

    @property
    def teacher(self) -> str | None:
        """The teacher without what only this machine knows: a file by its name, a folder by the last part of its."""
        spec = self.state.get('config', {}).get('teacher')
        return None if spec in (None, 'none') else _public_name(spec)

    @property
    def teacher_temperature(self) -> float | None:
        """T_c, as it was fitted or given."""
        given = self.state.get('config', {}).get('teacher_temperature')
        return self.state.get('teacher_temperature', None if given == 'auto' else given)

    @property
    def uses_average(self) -> bool:
        """Whether the weights are the moving average's."""
        return bool(self.arguments.get('model_ema')) and not self.arguments.get('model_ema_force_cpu')

    @property
    def base_models(self) -> list[str]:
        """Hub repositories that this model comes from: the weights it started from, and its teacher's."""
        specs = [self.arguments.get('model') if self.arguments.get('pretrained') else None, self.teacher]
        found = []
        for spec in specs:
            if spec and spec.startswith(('hf-hub:', 'hf_hub:')):
                found.append(re.split('[:@]', spec)[1])
            elif spec and is_model(spec):
                found.append(getattr(get_pretrained_cfg(spec), 'hf_hub_id', None))
        return list(dict.fromkeys(filter(None, found)))

    def metrics(self) -> dict[str, float]:
        """Validation metrics of the checkpoint's epoch; empty where the run had no validation."""
        rows = [row for row in self.epochs if row.get('epoch') == str(self.epoch)][-1:]
        return {name: float(row[name]) for row in rows for name in METRICS if row.get(name)}


def _read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of a summary.csv, of an epoch that was trained again the last; a resumed run begins with a header."""
    rows, header = {}, []
    if path.is_file():
        with open(path, newline='') as file:
            for cells in csv.reader(file):
                if cells[:1] == ['epoch']:
                    header = cells
                elif cells:
                    rows[cells[0]] = dict(zip(header, cells, strict=False))
    return list(rows.values())


def _public_name(spec: str) -> str:
    """A spec of the Hub or of timm as it is, of what else only this machine knows the last part of its path."""
    if spec.startswith(('hf-hub:', 'hf_hub:')) or is_model(spec):
        return spec
    return Path(spec.removeprefix('local-dir:')).name


def write_model_folder(run: FinishedRun, folder: Path, repository: str | None, license: str | None = None) -> None:
    """Weights, config, card and pictures; proven by loading it again.

    Args:
        run: The run.
        folder: An existing, empty folder.
        repository: ORG/NAME that the card will name, None for a folder that is not meant for the Hub.
        license: The Hub's identifier of a license, such as apache-2.0.

    Raises:
        AikdError: timm does not give the same model back.
    """
    # what belongs to other weights of this architecture, and sizes for tests that were never tried with these
    config = {
        key: value for key, value in run.model.pretrained_cfg.items()
        if key not in ('tag', 'license', 'origin_url', 'paper_ids', 'paper_name', 'description', 'notes', 'label_names',
                       'label_descriptions', 'label_offset', 'test_input_size', 'test_crop_pct', 'custom_load')}
    kept = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    config.update({key: run.data_config[key] for key in kept if key in run.data_config})
    run.model.pretrained_cfg = {**config, 'num_classes': run.model.num_classes}
    save_for_hf(
        run.model, str(folder), model_args=run.model_args, safe_serialization=True,
        model_config={'label_names': run.class_names} if run.class_names else None)
    _check_reload(run.model, folder)
    pictures = _draw(run, folder)
    (folder / 'README.md').write_text(model_card(run, repository, license, pictures), encoding='utf-8')


def model_card(
        run: FinishedRun,
        repository: str | None,
        license: str | None = None,
        pictures: list[str] | None = None,
) -> str:
    """The card, metadata included, as Markdown."""
    metrics, is_aikd = run.metrics(), bool(run.state)
    where = f'hf-hub:{repository}' if repository else 'local-dir:PATH'
    title = repository.rpartition('/')[2] if repository else f'{run.name} on {run.data_set}'
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', 'timm-aikd', *(['self-distillation'] if is_aikd else [])],
        base_model=run.base_models or None,
        datasets=[run.data_set.partition('/')[2]] if run.data_set.startswith(('hfds/', 'hfids/')) else None,
        license=license,
        metrics=[METRICS[name][0] for name in metrics] or None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=run.data_set, dataset_name=run.data_set,
                dataset_split=run.arguments.get('val_split') or None, metric_type=kind, metric_name=label,
                metric_value=round(metrics[name], 4))
            for name, (kind, label) in METRICS.items() if name in metrics
        ] or None,
    )
    parts = [
        f'---\n{data.to_yaml()}\n---', f'# {title}', _introduction(run), _results(run, metrics),
        *(f'![{name}]({name})' for name in pictures or ()),
        f"""## Use

```python
import timm

model = timm.create_model('{where}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

As a teacher of the next generation: `--aikd --aikd-teacher {where}`.""",
        _training(run),
    ]
    if is_aikd:
        parts.append(f'## Citation\n\n{CITATION}')
    return '\n\n'.join(part for part in parts if part) + '\n'


def _introduction(run: FinishedRun) -> str:
    how = (
        'by [AI-KD](https://arxiv.org/abs/2211.10938) self-knowledge distillation' if run.state else
        'by plain training')
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    size = ' x '.join(map(str, run.data_config['input_size']))
    return (
        f'A timm `{run.name}` ({parameters:.1f} M parameters, input {size}) for {run.model.num_classes} classes of '
        f'{_cell(run.data_set)}, trained {how}.')


def _results(run: FinishedRun, metrics: dict[str, float]) -> str:
    if not metrics:
        return ''
    teacher = run.state.get('teacher_metrics') or {}
    lines = ['## Results', f'| | model |{" teacher |" if teacher else ""}', f'|---|---|{"---|" if teacher else ""}']
    for name, (_, label) in METRICS.items():
        if name in metrics:
            value = teacher.get({'eval_loss': 'nll'}.get(name, name.removeprefix('eval_')))
            theirs = '' if not teacher else f' {value:.4g} |' if value is not None else ' |'
            lines.append(f'| {label} | {metrics[name]:.4g} |{theirs}')
    of = 'the moving average of the weights' if run.uses_average else 'the weights'
    note = (
        f'Of {of} after epoch {run.epoch} (the first is 0), on the validation split by which that epoch was chosen: '
        f'not an untouched test set.')
    if teacher:
        note += f' The teacher\'s, with T_c applied, are of {teacher["samples"]:,} of these images.'
    return '\n\n'.join([lines[0], '\n'.join(lines[1:]), note])


def _training(run: FinishedRun) -> str:
    lines = ['## Training', '', f'Data set: {_cell(run.data_set)}, {run.model.num_classes} classes.']
    if run.teacher:
        temperature = run.teacher_temperature
        lines[-1] += f' Teacher: `{run.teacher}`' + (
            '.' if temperature is None else f', its logits divided by T_c = {temperature:.4g}.')
    tables = {'timm': _recipe(run.arguments)}
    if run.state:
        options = {**run.state['config'], 'teacher': run.teacher or 'none', 'memory_dir': None}
        options['teacher_model'] = options.get('teacher_model') and _public_name(options['teacher_model'])
        if 'teacher_precision' in run.state:
            options['teacher_dtype'] = run.state['teacher_precision']
        tables = {'AI-KD': {f'aikd_{name}': value for name, value in options.items()}, **tables}
    for name, values in tables.items():
        lines += ['', f'| {name} | |', '|---|---|']
        lines += [f'| `{key}` | {_cell(value)} |' for key, value in values.items() if value is not None]
    return '\n'.join([*lines, '', f'Written by timm-aikd {__version__} with timm {timm.__version__}.'])


def _recipe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments that were in use."""
    needs = {'amp_dtype': 'amp', 'clip_mode': 'clip_grad', 'model_ema_decay': 'model_ema', 'remode': 'reprob'}
    used = {
        name: arguments[name] for name in RECIPE
        if arguments.get(name) and arguments.get(needs.get(name, name))}
    for name in ('model', 'initial_checkpoint'):
        if name in used:
            used[name] = _public_name(str(used[name]))
    return {**used, 'seed': arguments.get('seed')}


def _cell(value: Any) -> str:
    """A value that cannot break a Markdown table, or tell more of a machine than the last part of a path."""
    text = ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = Path(text).name if os.path.isabs(text) else text
    return re.sub(r'([|<>`\\])', r'\\\1', ' '.join(text.split()))


def _draw(run: FinishedRun, folder: Path) -> list[str]:
    from .plots import training_curves

    try:
        return ['curves.png'] if training_curves(folder / 'curves.png', run.epochs) else []
    except AikdError as error:
        print(f'note: the card has no pictures: {error}')
        return []


@torch.inference_mode()
def _check_reload(model: TimmModel, folder: Path) -> None:
    """Nobody should download what does not load, or answers otherwise."""
    input = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        again = create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:
        raise AikdError(
            f'push: timm {timm.__version__} cannot load this model again ({" ".join(str(error).split())[:100]}): a '
            f'newer timm may') from error
    expected = model.eval()(input)
    if not expected.isfinite().all():
        raise AikdError('push: the model\'s answers are not finite: the run diverged, choose another --checkpoint')
    if not torch.equal(again.eval()(input), expected):
        raise AikdError(
            f'push: the model that timm {timm.__version__} builds from the folder answers otherwise than the run\'s: '
            f'a newer timm may keep all of its arguments')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own command line."""
    parser.add_argument('run_dir', metavar='RUN_DIR', help='output folder of a run of timm\'s train.py')
    parser.add_argument('repository', nargs='?', metavar='ORG/NAME', help='model repository on the Hub, made if needed')
    parser.add_argument('--to-folder', metavar='PATH', help='write the model here, and upload nothing')
    parser.add_argument(
        '--checkpoint', default='model_best.pth.tar', metavar='NAME', help='file in RUN_DIR (%(default)s)')
    parser.add_argument(
        '--class-map', metavar='FILE',
        help='class names, one a line, in the order of the outputs (those that a run with --aikd has kept)')
    parser.add_argument('--license', metavar='ID', help='as the Hub calls it, such as apache-2.0 (none)')
    parser.add_argument('--private', action='store_true', help='make the repository a private one')


def push(args: argparse.Namespace) -> None:
    """Write the model's folder, and upload it unless `--to-folder` is given.

    Raises:
        AikdError: A bad argument, a run without a usable checkpoint, or a Hub that does not take it.
    """
    repository = None
    if args.repository is not None:
        match = _REPOSITORY.fullmatch(args.repository)
        if match is None or '..' in args.repository or '--' in args.repository:
            raise AikdError(f'push: {args.repository} is no repository of the Hub: write ORG/NAME')
        repository = match[2]
    if repository is None and args.to_folder is None:
        raise AikdError('push: where to? give ORG/NAME, or --to-folder PATH to upload nothing')
    target = Path(args.to_folder) if args.to_folder else None
    if target is not None and os.path.exists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise AikdError(f'--to-folder {target}: is there already: name a new or an empty folder')
    run = FinishedRun.read(args.run_dir, args.checkpoint)
    if args.class_map is not None:
        run.class_names = _read_names(args.class_map, run.model.num_classes)
    if run.class_names is None:
        print('note: the run does not tell its class names, and neither will the model: --class-map gives them')
    parent = None
    if target is not None:
        try:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AikdError(f'--to-folder {target}: cannot be made ({error.strerror}): name another') from error
        parent = target.absolute().parent
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix='.timm-aikd-') as scratch:
            folder = Path(scratch) / 'model'
            folder.mkdir()
            write_model_folder(run, folder, repository, args.license)
            files = ', '.join(sorted(file.name for file in folder.iterdir()))
            if target is not None:
                if target.exists():
                    target.rmdir()
                shutil.move(folder, target)
                print(f'{target}: {files}\nload it with timm.create_model(\'local-dir:{target}\', pretrained=True)')
            elif repository is not None:
                url = _upload(folder, repository, args.private)
                print(f'{url}: {files}\nload it with timm.create_model(\'hf-hub:{repository}\', pretrained=True)')
    except OSError as error:
        if type(error).__module__.startswith(('huggingface_hub', 'httpx', 'requests')):
            raise
        raise AikdError(
            f'push: cannot write to {error.filename or parent or "the folder for temporary files"} '
            f'({error.strerror or error}): name another folder with room') from error


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import errors as hub

    api = HfApi(library_name='timm-aikd', library_version=__version__)
    try:
        if api.repo_exists(repository):
            if private and not api.repo_info(repository).private:
                raise AikdError(
                    f'--private: {repository} exists and is public: change that on the Hub, or leave it out')
            print(f'note: {repository} exists: its README.md, config.json and model.safetensors are replaced')
        api.create_repo(repository, private=private, exist_ok=True)
        # all files in one commit: nobody sees weights without their config
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message='Add model')
    except AikdError:
        raise
    except Exception as error:  # of the client, the network, or the Hub's answer
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        if isinstance(error, hub.LocalTokenNotFoundError) or status == 401:
            remedy = 'log in with `hf auth login` or HF_TOKEN'
        elif status == 403:
            remedy = f'this token must not write to {repository.partition("/")[0]}: use one that may'
        elif isinstance(error, hub.OfflineModeIsEnabled):
            remedy = 'unset HF_HUB_OFFLINE'
        else:
            remedy = 'check the network and HF_ENDPOINT and try again, or write it --to-folder'
        raise AikdError(
            f'push {repository}: the Hub did not take it ({type(error).__name__}'
            f'{f", {status}" if status else ""}): {remedy}') from error
    return str(commit.commit_url).partition('/commit/')[0]


def _read_names(path: str, classes: int) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AikdError(f'--class-map {path}: cannot be read as text, one name a line: check the file') from error
    if len(names) != classes or len(set(names)) != classes:
        raise AikdError(
            f'--class-map {path}: has {len(names)} names ({len(set(names))} different), the model has {classes} '
            f'classes: one name a line in the order of the outputs')
    return names
