"""Where a teacher comes from: a spec (Hub id, folder, file, timm model name) -> a model with its own weights."""
import argparse
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import clean_state_dict, create_model, is_model

from . import AikdError
from .hub import careful_downloads, check_config, explain, one_line

_logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.bin', '.safetensors')
FORMS = (
    'hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file ({}), the output folder of a run, '
    'a timm model name, or none'.format(' '.join(WEIGHT_SUFFIXES))
)
_NAME_IT = 'name its architecture with --aikd-teacher-model (evaluate: --model-name)'
_HUB_ID = re.compile(r'[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?')


class TimmModel(nn.Module):
    """What timm gives the models that it builds, for annotations only: they share no class."""
    pretrained_cfg: dict[str, Any]
    num_classes: int


def _create(name: str, **kwargs: Any) -> TimmModel:
    return cast(TimmModel, create_model(name, **kwargs))


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Let the errors within, which begin with the spec, begin with the option that it was given as."""
    try:
        yield
    except AikdError as error:
        raise AikdError(f'{option} {error.args[0]}') from error.__cause__


def parse_spec(spec: str) -> tuple[str, str]:
    """Kind and value of a teacher spec, checked as far as this machine's disk can tell.

    Returns:
        ('none', ''), ('hf-hub', 'ORG/NAME[@REVISION]'), ('local-dir', folder), ('file', path) or ('name', model).

    Raises:
        AikdError: An unknown form, or a file or folder that is not there.
    """
    source, colon, value = spec.partition(':')
    if spec == 'none':
        return 'none', ''
    if colon and source in ('hf-hub', 'hf_hub'):
        if not _HUB_ID.fullmatch(value) or '..' in value:
            raise AikdError(f'{spec}: a Hub teacher is written hf-hub:ORG/NAME[@REVISION]')
        return 'hf-hub', value
    if colon and source == 'local-dir':
        if not os.path.isfile(os.path.join(value, 'config.json')):
            raise AikdError(f'{spec}: no config.json in this folder; save_for_hf of timm writes one')
        return 'local-dir', value
    if spec.endswith(WEIGHT_SUFFIXES):
        if not os.path.isfile(spec):
            raise AikdError(f'{spec}: no such file: check the path')
        return 'file', spec
    if os.path.isdir(spec):
        best = os.path.join(spec, 'model_best.pth.tar')
        if not os.path.isfile(best):
            other = f'use local-dir:{spec}' if os.path.isfile(f'{spec}/config.json') else 'name a weights file'
            raise AikdError(f'{spec}: not the output of a run, it has no model_best.pth.tar; {other}')
        return 'file', best
    if is_model(spec):
        return 'name', spec
    hint = f'; did you mean hf-hub:{spec}' if _HUB_ID.fullmatch(spec) else ''
    raise AikdError(f'{spec}: no such file, folder or timm model{hint}; allowed: {FORMS}')


def from_timm(kind: str, value: str, spec: str) -> tuple[TimmModel, dict[str, Any]]:
    """A published model with its own weights, and its config.

    Raises:
        AikdError: It cannot be had, or is not timm's.
    """
    try:
        if kind == 'local-dir':
            check_config(Path(value) / 'config.json')
        with careful_downloads():
            model = _create(value if kind == 'name' else f'{kind}:{value}', pretrained=True)
    except Exception as error:
        raise explain(error, spec) from error
    _check_weights(spec, model)
    return model, model.pretrained_cfg


def pinned(spec: str) -> str:
    """The spec of a model that has been loaded, for a Hub model with the commit that its files are of."""
    kind, value = parse_spec(spec)
    if kind != 'hf-hub':
        return spec
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = value.partition('@')
    config = try_to_load_from_cache(repository, 'config.json', revision=revision or None)
    if not isinstance(config, str):
        return spec
    commit = Path(config).parent.name
    if not isinstance(try_to_load_from_cache(repository, 'model.safetensors', revision=commit), str):
        _logger.info(f'AI-KD: {spec} has no safetensors; its pickled weights are read as tensors only')
    return f'hf-hub:{repository}@{commit}'


def load_model(spec: str, model_name: str | None = None) -> tuple[TimmModel, dict[str, Any] | None, bool]:
    """The model that a spec names, with its own weights.

    Returns:
        The model, how its input was prepared in training where that is known, and whether it is a published one.

    Raises:
        AikdError: It cannot be found or read.
    """
    kind, value = parse_spec(spec)
    if kind == 'file':
        return *from_file(value, model_name, None), False
    return *from_timm(kind, value, spec), True


def from_file(
        path: str,
        model_name: str | None,
        default_model_name: str | None,
        num_classes: int | None = None,
) -> tuple[TimmModel, dict[str, Any] | None]:
    """A model built after its own weights, and how its input was prepared where the file tells."""
    weights, arguments = read_checkpoint(path)
    name = model_name or arguments.get('model') or default_model_name
    if name is None:
        raise AikdError(f'{path}: stores no architecture; {_NAME_IT}')
    model, _, data_config = build(path, weights, {**arguments, 'model': name}, num_classes)
    _check_weights(path, model)
    return model, data_config if arguments else None


def _check_weights(spec: str, model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # buffers with infinities can be masks
        if tensor.isnan().any() or (isinstance(tensor, nn.Parameter) and tensor.isinf().any()):
            raise AikdError(f'{spec}: its weights are not finite ({name}): choose an earlier checkpoint')


def build(
        path: str,
        weights: dict[str, torch.Tensor],
        arguments: dict[str, Any],
        num_classes: int | None = None,
) -> tuple[TimmModel, dict[str, Any], dict[str, Any]]:
    """A model built after its own weights: their classes and channels, whatever the training arguments say.

    Args:
        path: What to call the weights in messages.
        weights: The state dict.
        arguments: Of the training script, `model` at least.
        num_classes: Number of classes where the weights do not tell it.

    Returns:
        The model, what `create_model` needed besides name and classes, and how the input was prepared.

    Raises:
        AikdError: The weights are those of another model, or the training arguments of none.
    """
    try:
        return _build(path, weights, arguments, num_classes)
    except AikdError:
        raise
    except Exception as error:  # of timm, or of arguments that no script of timm has kept so
        raise AikdError(
            f'{path}: its training arguments make no model ({type(error).__name__}: {one_line(error)}); save its '
            f'weights alone, as model.state_dict()') from error


def _build(
        path: str,
        weights: dict[str, torch.Tensor],
        arguments: dict[str, Any],
        num_classes: int | None,
) -> tuple[TimmModel, dict[str, Any], dict[str, Any]]:
    name = arguments['model']
    kwargs = dict(arguments.get('model_kwargs') or {}, global_pool=arguments.get('gp'), bn_eps=arguments.get('bn_eps'))
    try:
        config = _create(name, **kwargs).pretrained_cfg
    except Exception as error:
        raise AikdError(f'{path}: no such architecture {name!r} ({one_line(error)}); {_NAME_IT}') from error
    num_classes = _length(weights, config.get('classifier'), 0, default=num_classes)
    kwargs['in_chans'] = _length(weights, config.get('first_conv'), 1, default=arguments.get('in_chans') or 3)
    *_, height, width = arguments.get('input_size') or [arguments.get('img_size')] * 2
    tries: list[dict[str, Any]] = [{}]
    if height and config.get('fixed_input_size') and 'img_size' not in kwargs:
        # first, for the weights of a Swin fit any size
        tries.insert(0, {'img_size': height if height == width else (height, width)})
    for extra in tries:
        model = _create(name, num_classes=num_classes, **kwargs, **extra)
        misfit = _misfit(model, weights)
        if misfit is None:
            model.load_state_dict(weights)
            model_args = {key: value for key, value in {**kwargs, **extra}.items() if value is not None}
            data_config = resolve_data_config(arguments, model=model)
            data_config['input_size'] = (kwargs['in_chans'], *data_config['input_size'][1:])
            model.pretrained_cfg = {  # not the names of a model that the run started from
                **{key: value for key, value in model.pretrained_cfg.items() if not key.startswith('label_')},
                'label_names': names if len(names := arguments.get('class_names') or []) == model.num_classes else None}
            return model, model_args, data_config
    raise AikdError(f'{path}: these weights are not those of a {name} ({misfit}); {_NAME_IT}')


def load_checkpoint(path: str) -> Any:
    """A file of torch.save, tensors and plain containers only."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its arguments so
        return torch.load(path, map_location='cpu', weights_only=True)


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and training arguments of a file, the latter with `class_names` where a run with AI-KD has kept them; EMA
    weights where they were validated. Never unpickles code.

    Raises:
        AikdError: Not readable, not a checkpoint, or one that needs more than tensors and plain containers.
    """
    try:
        if path.endswith('.safetensors'):
            return safetensors.torch.load_file(path), {}
        checkpoint = load_checkpoint(path)
    except Exception as error:  # of pickle, zip, safetensors or the file system
        raise AikdError(
            f'{path}: not readable as weights, truncated, or more than tensors and plain containers, '
            f'which is never unpickled ({type(error).__name__}); save it again or as .safetensors') from error
    arguments = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    class_names = _class_names(checkpoint)
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    if getattr(arguments, 'model_ema_force_cpu', False):
        keys = keys[::-1]  # that average was not the model that was validated
    for key in keys:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = {**checkpoint[key]}
            break
    if not isinstance(checkpoint, dict) or not checkpoint or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in checkpoint.items()):
        raise AikdError(f'{path}: holds no state dict; save the weights as model.state_dict()')
    # --split-bn: the main statistics are those of the evaluation
    checkpoint = {key: value for key, value in clean_state_dict(checkpoint).items() if '.aux_bn.' not in key}
    if isinstance(arguments, argparse.Namespace) and class_names is not None:
        arguments = argparse.Namespace(**{**vars(arguments), 'class_names': class_names})
    return checkpoint, dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def _class_names(checkpoint: Any) -> list[str] | None:
    try:
        names = checkpoint['task_state']['aikd']['class_names']
    except (KeyError, TypeError, IndexError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _length(weights: dict[str, torch.Tensor], layers: Any, dim: int, default: int | None) -> int | None:
    """Size of the weight of the layer that timm's config names (the first of several)."""
    layer = layers[0] if isinstance(layers, (tuple, list)) else layers
    weight = weights.get(f'{layer}.weight')
    return weight.shape[dim] if weight is not None else default


def _misfit(model: nn.Module, weights: dict[str, torch.Tensor]) -> str | None:
    own = model.state_dict()
    wrong = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if wrong:
        return f'{wrong[0]} is {list(weights[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}'
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or surplus:
        return f'{len(missing)} keys missing, {len(surplus)} unknown, such as {(missing + surplus)[0]}'
    return None
