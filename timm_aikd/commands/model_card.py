"""The model card of a finished run."""
import os
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from .. import __version__
from .finished_run import FinishedRun, is_public, public_name

LABELS = {  # column of summary.csv -> type in the card's metadata, key among the teacher's metrics, heading
    'eval_top1': ('accuracy', 'top1', 'top-1 %'),
    'eval_top5': ('top-5-accuracy', 'top5', 'top-5 %'),
    'eval_loss': ('nll', 'nll', 'NLL'),
    'eval_ece': ('ece', 'ece', 'ECE % (15 bins)'),
    'eval_aurc': ('aurc', 'aurc', 'AURC x 1000'),
}
RECIPE = (  # arguments of timm's scripts that a reader of the card wants to know, where they are set
    'model', 'pretrained', 'initial_checkpoint', 'epochs', 'warmup_epochs', 'cooldown_epochs', 'batch_size',
    'grad_accum_steps', 'world_size', 'opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'layer_decay', 'lr',
    'lr_base', 'lr_base_size', 'lr_base_scale', 'sched', 'min_lr', 'warmup_lr', 'clip_grad', 'clip_mode', 'no_aug',
    'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'aug_repeats', 'reprob', 'remode', 'mixup', 'cutmix',
    'mixup_mode', 'smoothing', 'bce_loss', 'bce_sum', 'bce_target_thresh', 'drop', 'drop_path', 'head_init_scale',
    'model_ema', 'model_ema_decay', 'amp', 'amp_dtype', 'model_dtype', 'torchcompile',
)
NEEDS = {  # of which one must be set, or the argument had no effect
    'amp_dtype': ['amp'], 'clip_mode': ['clip_grad'], 'model_ema_decay': ['model_ema'], 'remode': ['reprob'],
    'mixup_mode': ['mixup', 'cutmix', 'cutmix_minmax'], 'bce_sum': ['bce_loss'], 'bce_target_thresh': ['bce_loss'],
}
AUGMENTATION = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob', 'remode')  # off with no_aug
LISTED_CLASSES = 100
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
USE = """## Use

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{where}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open('image.jpg').convert('{mode}'))
{comment}temperature = {temperature:.4g}
with torch.inference_mode():
    probabilities = (model(image[None])[0] / temperature).softmax(-1)
names = model.pretrained_cfg.get('label_names') or range(len(probabilities))
for probability, index in zip(*probabilities.topk({shown})):
    print(f'{{names[index]}}: {{probability:.1%}}')
```

As a teacher in timm's train.py (`pip install timm-aikd`): `--aikd --aikd-teacher {where}`."""


def model_card(
        run: FinishedRun,
        repository: str | None,
        license: str | None = None,
        temperature: float | None = None,
        pictures: list[str] | None = None,
) -> str:
    """The card, metadata included, as Markdown.

    Args:
        run: The run.
        repository: ORG/NAME on the Hub; None for a local folder.
        license: The Hub's identifier of a license.
        temperature: Divides the logits in the code of the card; None: 1.
        pictures: Files to show.
    """
    title = repository.rpartition('/')[2] if repository else f'{run.name} on {_cell(run.data_set)}'
    parts = [
        f'---\n{_metadata(run, title, license).to_yaml()}\n---', f'# {title}', _introduction(run),
        _results(run, temperature), *(f'![{name}]({name})' for name in pictures or ()),
        _use(run, repository, temperature), _classes(run), _training(run),
        f'## Citation\n\n{CITATION}' if run.state else '']
    return '\n\n'.join(part for part in parts if part) + '\n'


def _use(run: FinishedRun, repository: str | None, temperature: float | None) -> str:
    comment = '# fitted after training: the probabilities are calibrated, the order of the classes stays\n'
    return USE.format(
        where=f'hf-hub:{repository}' if repository else 'local-dir:PATH',
        mode='L' if run.data_config['input_size'][0] == 1 else 'RGB',
        comment=comment if temperature else '',
        temperature=temperature or 1,
        shown=min(3, run.model.num_classes))


def _metadata(run: FinishedRun, title: str, license: str | None) -> ModelCardData:
    metrics = run.metrics()
    dataset = run.arguments.get('dataset') or ''
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=run.data_set, dataset_name=run.data_set,
            dataset_split=run.arguments.get('val_split') or None, metric_type=LABELS[name][0],
            metric_name=LABELS[name][2], metric_value=round(value, 4))
        for name, value in metrics.items()
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', 'timm-aikd', *(['self-distillation'] if run.state else [])],
        base_model=run.base_models or None,
        datasets=[dataset.partition('/')[2]] if dataset.startswith(('hfds/', 'hfids/')) else None,
        license=license,
        metrics=[LABELS[name][0] for name in metrics] or None,
        model_name=title,
        eval_results=results or None,
    )


def _introduction(run: FinishedRun) -> str:
    how = (
        'with timm and [AI-KD](https://arxiv.org/abs/2211.10938) self-knowledge distillation' if run.state else
        'with timm, without distillation')
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    size = ' x '.join(map(str, run.data_config['input_size']))
    return (
        f'A timm `{run.name}` ({parameters:.1f} M parameters, input {size}) for {run.model.num_classes} classes of '
        f'{_cell(run.data_set)}, trained {how}.')


def _results(run: FinishedRun, temperature: float | None) -> str:
    metrics = run.metrics()
    if not metrics:
        return ''
    teacher = (run.state.teacher_metrics if run.state else None) or {}
    labels = [LABELS[name] for name in metrics]
    rows = {'': [heading for *_, heading in labels], '---': ['---'] * len(metrics)}
    if teacher:
        rows['baseline: the teacher'] = [_number(teacher.get(key)) for _, key, _ in labels]
    rows['this model'] = [_number(value) for value in metrics.values()]
    notes = _notes(run, teacher, temperature)
    table = '\n'.join(f'| {" | ".join([name, *cells])} |' for name, cells in rows.items())
    return f'## Results\n\n{table}\n\n{" ".join(notes)}'


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.4g}'


def _notes(run: FinishedRun, teacher: dict[str, float], temperature: float | None) -> list[str]:
    weights = 'the moving average of the weights' if run.uses_average else 'the weights'
    notes = [
        f'Of {weights} after epoch {run.epoch} (the first is 0), on the validation split by which that epoch was '
        f'chosen: not an untouched test set.']
    if teacher:
        notes.append(f'The teacher\'s, with T_c applied, are of {int(teacher.get("samples", 0)):,} of these images.')
    if 'train_top1' in teacher:
        notes.append(f'Its top-1 on training images, without augmentation, was {teacher["train_top1"]:.4g} %.')
    if temperature:
        notes.append('The code below scales the logits by a temperature, which changes NLL, ECE and AURC.')
    return notes


def _classes(run: FinishedRun) -> str:
    if not run.class_names:
        return ''
    names = ', '.join(map(_cell, run.class_names[:LISTED_CLASSES]))
    more = len(run.class_names) - LISTED_CLASSES
    return f'## Classes\n\n{names}' + (f', and {more:,} more in config.json' if more > 0 else '')


def _training(run: FinishedRun) -> str:
    text = f'Data set: {_cell(run.data_set)}, {run.model.num_classes} classes.{_teachers(run)}'
    tables = {'timm': _recipe(run.arguments)}
    if run.state:
        options = {**run.state.config, 'teacher': run.teachers or 'none', 'memory_dir': None}
        options['teacher_model'] = options.get('teacher_model') and public_name(options['teacher_model'])
        tables = {'AI-KD': {f'aikd_{name}': value for name, value in options.items()}, **tables}
    lines = ['## Training', '', text]
    for name, values in tables.items():
        lines += ['', f'| {name} | |', '|---|---|']
        lines += [f'| `{key}` | {_cell(value)} |' for key, value in values.items() if value is not None]
    return '\n'.join([*lines, '', f'Written by timm-aikd {__version__} with timm {timm.__version__}.'])


def _teachers(run: FinishedRun) -> str:
    if not run.teachers:
        return ''
    names = [f'`{name}`' + ('' if is_public(name) else ' (a local model)') for name in run.teachers]
    temperature = run.teacher_temperature
    scaled = '' if temperature is None else f'; logits divided by T_c = {temperature:.4g}'
    return f' Teacher: {", ".join(names)}{scaled}.'


def _recipe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments that had an effect."""
    used = {
        name: arguments[name] for name in RECIPE
        if arguments.get(name) and any(arguments.get(need) for need in NEEDS.get(name, [name]))
        and not (arguments.get('no_aug') and name in AUGMENTATION)}
    for name in ('model', 'initial_checkpoint'):
        if name in used:
            used[name] = public_name(str(used[name]))
    return {**used, 'seed': arguments.get('seed')}


def _cell(value: Any) -> str:
    """A value that cannot break a Markdown table; of an absolute path only the last part."""
    text = ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = Path(text).name if os.path.isabs(text) else text
    return re.sub(r'([|<>`\\])', r'\\\1', ' '.join(text.split()))
