"""A model built after a checkpoint: its weights tell the classes and channels, whatever its training arguments say."""
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, list_models

from ..errors import AikdError, one_line
from .checkpoint import Checkpoint, Weights
from .hub import CONFIG, check_config
from .model import LoadedModel, TimmModel, create
from .run_classes import run_class_names
from .spec import TeacherSpec, closest

_NAME_IT = 'name its architecture with `teacher_model`'
_HUB = 'hf-hub:', 'hf_hub:'
_CLASSIFIERS = ('head.fc', 'head', 'fc', 'classifier', 'last_linear')  # of older layouts


def build_model(
        checkpoint: Checkpoint,
        name: str,
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
) -> LoadedModel:
    """The model that a checkpoint is of; needs no network.

    Args:
        checkpoint: Its weights, and the arguments that its model was built with.
        name: The architecture.
        num_classes: Number of classes where the weights do not tell it.
        model_args: Arguments of `create_model` for bare weights.

    Raises:
        AikdError: The weights are those of another model, or the training arguments of none.
    """
    try:
        return _build(checkpoint, name, num_classes, model_args or {})
    except AikdError:
        raise
    except Exception as error:  # of timm, or of arguments that no script of timm has kept so
        raise AikdError(
            f'{checkpoint.path}: its training arguments make no model ({type(error).__name__}: {one_line(error)}); '
            f'save its weights alone, as model.state_dict()') from error


def _build(checkpoint: Checkpoint, name: str, num_classes: int | None, model_args: dict[str, Any]) -> LoadedModel:
    arguments, weights = checkpoint.arguments, checkpoint.weights
    source, config, kwargs = _architecture(checkpoint.path, name)
    given, size = _given(arguments, model_args)
    channels = _length(weights, config.get('first_conv'), 1) or arguments.get('in_chans') or 3
    num_classes = _length(weights, config.get('classifier'), 0) or num_classes
    kwargs.update(given, num_classes=num_classes, in_chans=channels)
    tries = [kwargs]
    if size and config.get('fixed_input_size'):  # first, for the weights of a Swin fit any size
        tries.insert(0, {'img_size': _spatial(size), **kwargs})
    model, kwargs = _fitting(checkpoint, name, source, tries)
    # not the names of a model that the run started from
    model.pretrained_cfg.update(label_names=_label_names(checkpoint, model.num_classes), label_descriptions=None)
    return LoadedModel(
        model,
        checkpoint.path,
        _data_config(arguments, model, channels) if arguments else None,
        knows_normalisation={'mean', 'std'} <= arguments.keys(),
        model_args={key: value for key, value in kwargs.items() if key != 'num_classes'},
        checkpoint=checkpoint)


def _given(arguments: dict[str, Any], model_args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments for `create_model` and the size of the input, of the training script or, without that, as given."""
    if arguments:
        size = arguments.get('input_size') or arguments.get('img_size')
        model_args = {
            **(arguments.get('model_kwargs') or {}), 'global_pool': arguments.get('gp'),
            'bn_eps': arguments.get('bn_eps')}
    else:
        model_args = dict(model_args)
        size = model_args.pop('img_size', None)
    return {key: value for key, value in model_args.items() if value is not None}, size


def _data_config(arguments: dict[str, Any], model: TimmModel, channels: int) -> dict[str, Any]:
    """How the training script prepared the input."""
    size = arguments.get('input_size')
    if isinstance(size, int):  # other scripts than timm's keep one number
        arguments = {**arguments, 'input_size': (channels, size, size)}
    config = dict(resolve_data_config(arguments, model=model))
    return {**config, 'input_size': (channels, *config['input_size'][1:])}


def _label_names(checkpoint: Checkpoint, num_classes: int) -> list[str] | None:
    """Names of the outputs; of the first ones where the run forgot --num-classes."""
    names = checkpoint.class_names or run_class_names(checkpoint.path, checkpoint.arguments) or []
    may_have_more = checkpoint.arguments.get('num_classes') is None
    return names if names and (len(names) == num_classes or may_have_more and len(names) < num_classes) else None


def _architecture(path: str, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name for `create_model` that asks no network, timm's config of the architecture, and saved model arguments."""
    if not isinstance(name, str):  # arguments of other scripts
        raise AikdError(f'{path}: no such architecture {name!r}; {_NAME_IT}')
    folder, own = _published_config(name)
    architecture = str(own.get('architecture', name))
    if folder is None and name.startswith(_HUB):
        architecture = name.partition('@')[0].rpartition('/')[2]  # which timm names after the model
    if not is_model(architecture):
        raise AikdError(
            f'{path}: no such architecture {name!r}{closest(name, list_models())}; import your code if that has it '
            f'(evaluate, push: --import), or {_NAME_IT}')
    config = get_pretrained_cfg(architecture)
    entries = {**(config.to_dict() if config is not None else {}), **own.get('pretrained_cfg', {})}
    return architecture if folder is None else f'local-dir:{folder}', entries, dict(own.get('model_args') or {})


def _published_config(name: str) -> tuple[str | None, dict[str, Any]]:
    """Folder and content of the config.json of a run's --model that is of the Hub or a folder, where it is here."""
    path: Any = None
    if name.startswith(_HUB):
        spec = TeacherSpec.parse(name)
        path = try_to_load_from_cache(spec.value, CONFIG, revision=spec.revision)
    elif name.startswith('local-dir:'):
        path = os.path.join(name.removeprefix('local-dir:'), CONFIG)
    if not isinstance(path, str) or not os.path.isfile(path):
        return None, {}
    check_config(Path(path))
    return os.path.dirname(path), json.loads(Path(path).read_text(encoding='utf-8'))


def _spatial(size: int | Sequence[int]) -> int | tuple[int, int]:
    """Size as `create_model` takes it: one number, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return height if height == width else (height, width)


def _fitting(
        checkpoint: Checkpoint,
        name: str,
        source: str,
        tries: list[dict[str, Any]],
) -> tuple[TimmModel, dict[str, Any]]:
    """The model that the weights are of, with them, and the arguments that it was built with."""
    misfits: list[str | None] = []
    for kwargs in (*tries, {**tries[-1], 'num_classes': 0}):
        model = create(source, **kwargs)
        misfits.append(_misfit(model, checkpoint.weights))
        if misfits[-1] is None:
            model.load_state_dict(checkpoint.weights)
            return model, kwargs
    for kwargs in tries:
        converted = _converted(source, checkpoint.weights, kwargs)
        if converted is not None:
            return converted, kwargs
    remedy = _NAME_IT if checkpoint.arguments else f'{_NAME_IT}, or give a checkpoint that stores its arguments'
    raise AikdError(f'{checkpoint.path}: these weights are not those of a {name} ({misfits[-2]}); {remedy}')


def _converted(source: str, weights: Weights, kwargs: dict[str, Any]) -> TimmModel | None:
    """The model of weights in its authors' or an older layout, by timm's own filter; None where they are none."""
    lengths = (_length(weights, layer, 0) for layer in _CLASSIFIERS)
    classes = next(filter(None, lengths), kwargs['num_classes'])
    from_memory = {
        'state_dict': dict(weights), 'source': None, 'file': None, 'custom_load': False, 'label_offset': 0,
        'num_classes': classes}
    try:
        model = create(
            source, pretrained=True, pretrained_cfg_overlay=from_memory, **{**kwargs, 'num_classes': classes})
    except Exception:  # the filter expects other weights, or what it made of these does not fit
        return None
    model.pretrained_cfg['state_dict'] = None
    own = model.state_dict()  # a filter may also resize weights, which would make another model of them
    return model if all(own[key].shape == weights[key].shape for key in own.keys() & weights.keys()) else None


def _length(weights: Weights, layers: Any, dim: int) -> int | None:
    """Size of the weight of a layer (the first of several), where there is one."""
    layer = layers[0] if isinstance(layers, (tuple, list)) else layers
    weight = weights.get(f'{layer}.weight')
    return weight.shape[dim] if weight is not None and weight.ndim > dim else None


def _misfit(model: TimmModel, weights: Weights) -> str | None:
    own = model.state_dict()
    wrong = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if wrong:
        return f'{wrong[0]} is {list(weights[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}'
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or surplus:
        return f'{len(missing)} keys missing, {len(surplus)} unknown, such as {(missing + surplus)[0]}'
    return None
