"""The teacher: a spec (Hub id, folder, file, timm model name) made into a frozen, checked model."""
import argparse
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import clean_state_dict, create_model, is_model
from timm.utils import unwrap_model

from . import AikdError

_logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.bin', '.safetensors')
FORMS = (
    'hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file ({}), the output folder of a run, '
    'a timm model name, or none'.format(' '.join(WEIGHT_SUFFIXES))
)
_HUB_ID = re.compile(r'[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?')
_CHANCE_LEVEL = 0.001


class Teacher(nn.Module):
    """A frozen model in eval mode that is fed the student's batch and answers with calibrated logits.

    Args:
        model: The pre-trained model; frozen here, its buffers never change.
        name: What to call it in messages.
        scale: Together with `shift` turns the student's normalised input into the model's, `x * scale + shift`,
            [1, channels, 1, 1]; None where both are normalised alike.
        shift: See `scale`.
        columns: For each of the student's classes, the model's class [C]; None where the order is the same.
        size: (height, width) the batch is resized to; None takes it as it comes.
        dtype: Run in this dtype, outside autocast; None runs as the student does.
        temperature: T_c, a number > 0: logits are divided by it; above 1 the teacher becomes less sure.
    """

    def __init__(
            self,
            model: nn.Module,
            name: str = 'teacher',
            scale: torch.Tensor | None = None,
            shift: torch.Tensor | None = None,
            columns: torch.Tensor | None = None,
            size: tuple[int, int] | None = None,
            dtype: torch.dtype | None = None,
            temperature: float = 1.,
    ):
        super().__init__()
        self.model = model.requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)
        self.name, self.size, self.dtype, self.temperature = name, size, dtype, temperature
        self.register_buffer('scale', scale, persistent=False)
        self.register_buffer('shift', shift, persistent=False)
        self.register_buffer('columns', columns, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs) -> None:
        """Compile the model, not this wrapper."""
        self.model.compile(**kwargs)

    @torch.no_grad()  # inference_mode tensors could not be saved for the student's backward
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] / T_c in float32, in the student's class order, for the student's input."""
        if self.scale is not None:
            input = (input * self.scale + self.shift).to(input.dtype)
        if self.size is not None and tuple(input.shape[-2:]) != self.size:
            input = F.interpolate(input.float(), self.size, mode='bicubic', antialias=True).to(input.dtype)
        if self.dtype is not None:
            input = input.to(self.dtype)
        exact = torch.autocast(input.device.type, enabled=False) if self.dtype is not None else nullcontext()
        with exact:
            logits = self.model(input)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        logits = logits.float()
        if self.columns is not None:
            logits = logits.index_select(-1, self.columns)
        return logits / self.temperature if self.temperature != 1. else logits


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
            raise AikdError(f'--aikd-teacher {spec}: a Hub teacher is written hf-hub:ORG/NAME[@REVISION]')
        return 'hf-hub', value
    if colon and source == 'local-dir':
        if not (Path(value) / 'config.json').is_file():
            raise AikdError(f'--aikd-teacher {spec}: no config.json in this folder; save_for_hf of timm writes one')
        return 'local-dir', value
    path = Path(spec)
    if spec.endswith(WEIGHT_SUFFIXES):
        if not path.is_file():
            raise AikdError(f'--aikd-teacher {spec}: no such file: check the path')
        return 'file', spec
    if path.is_dir():
        if not (path / 'model_best.pth.tar').is_file():
            other = f'use local-dir:{spec}' if (path / 'config.json').is_file() else 'name a weights file'
            raise AikdError(f'--aikd-teacher {spec}: not the output of a run, it has no model_best.pth.tar; {other}')
        return 'file', str(path / 'model_best.pth.tar')
    if is_model(spec):
        return 'name', spec
    hint = f'; did you mean hf-hub:{spec}' if _HUB_ID.fullmatch(spec) else ''
    raise AikdError(f'--aikd-teacher {spec}: no such file, folder or timm model{hint}; allowed: {FORMS}')


def load_teacher(
        spec: str,
        student: nn.Module,
        *,
        model_name: str | None = None,
        default_model_name: str | None = None,
        dtype: str = 'auto',
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
) -> Teacher | None:
    """Load the teacher that a spec names and fit it to the student.

    The teacher keeps its own classes and channels, which must then match the student's. The global random streams
    are not touched.

    Args:
        spec: One of the forms of `--aikd-teacher`.
        student: The model to be trained; on its device the teacher will run.
        model_name: Architecture of a weights file, over the one that is stored in it.
        default_model_name: Architecture of a weights file that stores none.
        dtype: 'auto' (as the student), 'float32', 'bfloat16' or 'float16'.
        mean: What the student's input is normalised with, one value a channel (default: the student's config).
        std: See `mean`.
        class_names: The student's class names in the order of its outputs, where they are known.

    Returns:
        The teacher, or None for the spec 'none'.

    Raises:
        AikdError: The teacher cannot be found, read or matched with the student.
    """
    kind, value = parse_spec(spec)
    if kind == 'none':
        return None
    student = unwrap_model(student)
    with torch.random.fork_rng(devices=[]):
        if kind == 'file':
            model, config = _from_file(value, model_name, default_model_name, student)
        else:
            model, config = _from_timm(kind, value, spec)
    model.eval()
    _check_shape(spec, model, student)
    columns = _match_classes(spec, model, class_names)
    weight = next(student.parameters())
    scale, shift = _renormalisation(student, mean, std, config, getattr(model, 'in_chans', 3))
    return Teacher(
        model.to(weight.device, weight.dtype),
        name=spec,
        scale=scale,
        shift=shift,
        columns=columns,
        size=_fixed_size(model, config),
        dtype=None if dtype == 'auto' else getattr(torch, dtype),
    ).to(weight.device)


def better_than_chance(correct: int, count: int, num_classes: int) -> bool:
    """Whether guessing among C classes gets `correct` of `count` right with less than 0.1 % probability."""
    chance = 1 / num_classes
    log_tail = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(chance) + (count - k) * math.log1p(-chance)
        for k in range(correct, count + 1)
    ]
    return sum(map(math.exp, log_tail)) < _CHANCE_LEVEL


def _from_timm(kind: str, value: str, spec: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model = create_model(value if kind == 'name' else f'{kind}:{value}', pretrained=True)
    except Exception as error:
        raise _explain(error, spec) from error
    return model, model.pretrained_cfg


def _explain(error: Exception, spec: str) -> AikdError:
    """Whatever stopped the Hub client or timm, as one line with a remedy."""
    from huggingface_hub import errors as hub

    name = f'--aikd-teacher {spec}'
    elsewhere = 'or give the teacher as local-dir:PATH or a weights file'
    if isinstance(error, hub.GatedRepoError):
        return AikdError(f'{name}: is gated; accept its terms on the Hub, then log in with `hf auth login` or HF_TOKEN')
    if isinstance(error, hub.RepositoryNotFoundError):
        return AikdError(f'{name}: no such repository on the Hub, or a private one: check the name, or set HF_TOKEN')
    if isinstance(error, hub.RevisionNotFoundError):
        return AikdError(f'{name}: the repository has no such branch, tag or commit: check what follows the @')
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)):
        return AikdError(
            f'{name}: not in the cache, and the Hub is offline or out of reach: unset HF_HUB_OFFLINE, check the '
            f'network and HF_ENDPOINT, point HF_HOME at a filled cache, {elsewhere}')
    if isinstance(error, hub.EntryNotFoundError):
        file = str(error.response.url).rpartition('/')[2]
        return AikdError(f'{name}: the repository has no {file}, which a timm model needs; choose another')
    return AikdError(
        f'{name}: could not be loaded as a timm model with pretrained weights ({type(error).__name__}: '
        f'{_one_line(error)}); check it, try again, {elsewhere}')


def _one_line(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else f'{text[:97]}...'


def _from_file(
        path: str,
        model_name: str | None,
        default_model_name: str | None,
        student: nn.Module,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """A model built after its own weights: their classes and channels, not the student's."""
    weights, arguments = read_checkpoint(path)
    name = model_name or arguments.get('model') or default_model_name
    if name is None:
        raise AikdError(f'--aikd-teacher {path}: stores no architecture; name it with --aikd-teacher-model')
    kwargs = dict(arguments.get('model_kwargs') or {}, global_pool=arguments.get('gp'))
    try:
        config = create_model(name, **kwargs).pretrained_cfg
    except Exception as error:
        raise AikdError(
            f'--aikd-teacher {path}: no such architecture {name!r} ({_one_line(error)}); '
            f'name another with --aikd-teacher-model') from error
    kwargs['num_classes'] = _length(weights, config.get('classifier'), 0, default=getattr(student, 'num_classes', None))
    kwargs['in_chans'] = _length(weights, config.get('first_conv'), 1, default=arguments.get('in_chans') or 3)
    *_, height, width = arguments.get('input_size') or [arguments.get('img_size')] * 2
    tries = [{}]
    if height and config.get('fixed_input_size') and 'img_size' not in kwargs:
        # first, for the weights of a Swin fit any size
        tries.insert(0, {'img_size': height if height == width else (height, width)})
    for extra in tries:
        model = create_model(name, **kwargs, **extra)
        misfit = _misfit(model, weights)
        if misfit is None:
            model.load_state_dict(weights)
            return model, resolve_data_config(arguments, model=model) if arguments else None
    raise AikdError(
        f'--aikd-teacher {path}: these weights are not those of a {name} ({misfit}); '
        f'name their architecture with --aikd-teacher-model')


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and training arguments of a file; EMA weights where it has them. Never unpickles code.

    Raises:
        AikdError: Not readable, not a checkpoint, or one that needs more than tensors and plain containers.
    """
    try:
        if path.endswith('.safetensors'):
            return safetensors.torch.load_file(path), {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its arguments so
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors or the file system
        raise AikdError(
            f'--aikd-teacher {path}: not readable as weights, truncated, or more than tensors and plain containers, '
            f'which is never unpickled ({type(error).__name__}); save it again or as .safetensors') from error
    arguments = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = {**checkpoint[key]}
            break
    if not isinstance(checkpoint, dict) or not checkpoint or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in checkpoint.items()):
        raise AikdError(f'--aikd-teacher {path}: holds no state dict; save the weights as model.state_dict()')
    return clean_state_dict(checkpoint), dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def _length(weights: dict[str, torch.Tensor], layers: Any, dim: int, default: int) -> int:
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


def _check_shape(spec: str, model: nn.Module, student: nn.Module) -> None:
    for attribute, what in (('num_classes', 'classes'), ('in_chans', 'input channels')):
        ours, theirs = getattr(student, attribute, None), getattr(model, attribute, None)
        if None not in (ours, theirs) and ours != theirs:
            raise AikdError(
                f'--aikd-teacher {spec}: has {theirs} {what}, the student has {ours}; '
                f'they must be the same: train or choose a teacher for this data set')


def _match_classes(spec: str, model: nn.Module, class_names: Sequence[str] | None) -> torch.Tensor | None:
    """Column of each of the student's classes in the teacher's logits; None where the order is the same or unknown."""
    names = model.pretrained_cfg.get('label_names')
    if isinstance(names, dict):
        names = [names.get(str(i), names.get(i)) for i in range(model.num_classes)]
    if not names or class_names is None:
        return None
    ours, theirs = list(class_names), list(names)
    if ours == theirs:
        return None
    if set(ours).isdisjoint(theirs):
        _logger.warning(
            f'AI-KD: the teacher names its classes otherwise ({theirs[0]!r}) than the data set ({ours[0]!r}): '
            f'the same order is assumed, and its top-1 will be tested')
        return None
    if Counter(ours) != Counter(theirs):
        odd = next(iter((Counter(ours) - Counter(theirs)) or (Counter(theirs) - Counter(ours))))
        raise AikdError(
            f'--aikd-teacher {spec}: other classes than the data set, {odd!r} is known to one side only: '
            f'train or choose a teacher for this data set')
    _logger.info('AI-KD: same classes in another order: the teacher\'s outputs are reordered by name')
    return torch.tensor([theirs.index(name) for name in ours])


def _renormalisation(
        student: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        config: dict[str, Any] | None,
        channels: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and shift from the student's normalisation to the teacher's; None where they are the same or unknown."""
    own = getattr(student, 'pretrained_cfg', {})
    mean, std = mean or own.get('mean'), std or own.get('std')
    if config is None or mean is None or std is None:
        if config is None:
            _logger.info('AI-KD: these weights say nothing of their normalisation: taken to be that of the student')
        return None, None

    def tensor(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(adapt_to_chs(tuple(values), channels), dtype=torch.float64).view(1, -1, 1, 1)

    mean_s, std_s, mean_t, std_t = map(tensor, (mean, std, config['mean'], config['std']))
    if torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t):
        return None, None
    return (std_s / std_t).float(), ((mean_s - mean_t) / std_t).float()


def _fixed_size(model: nn.Module, config: dict[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) that the model insists on, None where it takes any."""
    patches = getattr(model, 'patch_embed', None)
    strict = getattr(patches, 'strict_img_size', None)  # None: the model keeps no size, but was trained at one
    if not model.pretrained_cfg.get('fixed_input_size') or strict is False:
        return None
    height, width = patches.img_size if strict else (config or model.pretrained_cfg)['input_size'][1:]
    return int(height), int(width)
