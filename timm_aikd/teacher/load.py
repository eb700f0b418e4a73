"""`load_teacher`: the door of this room."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from timm.data.loader import adapt_to_chs
from timm.utils import unwrap_model

from ..errors import AikdError
from ..inference import folded, forward_layout
from ..ranks import first_on_each_host, logger
from .build import build_model
from .checkpoint import Checkpoint
from .classes import class_count, match_classes
from .ensemble import TeacherEnsemble
from .model import LoadedModel, TimmModel
from .published import load_published
from .spec import TeacherSpec, naming
from .teacher import Teacher, weights_digest


def load_teacher(
        spec: str | Sequence[str],
        student: nn.Module,
        *,
        model_name: str | None = None,
        default_model_name: str | None = None,
        dtype: str = 'auto',
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        requested_spec: str | Sequence[str] | None = None,
        uses_classes: bool = True,
        model_args: dict[str, Any] | None = None,
) -> Teacher | None:
    """Load the teacher that a spec names, or several as one, and fit it to the student.

    The teacher keeps its own classes and channels: the channels must be the student's, and among the classes must be
    the student's, whose outputs are then picked. The global random streams are not touched.

    Args:
        spec: One of the forms of `teacher`, or several.
        student: The model to be trained; on its device the teacher will run.
        model_name: Architecture of a weights file, over the one that is stored in it.
        default_model_name: Architecture of a weights file that stores none.
        dtype: 'float32', 'bfloat16', 'float16' or 'auto': as the student.
        size: Height and width that the input is resized to; None: as it comes, or the teacher's fixed size.
        mean: What the student's input is normalised with, one value a channel (default: the student's config).
        std: See `mean`.
        class_names: The student's class names in the order of its outputs, where they are known.
        requested_spec: What the user gave as `spec`, where that is the commit that a resumed run began with.
        uses_classes: Whether the classes must be the student's; False where only features are used.
        model_args: What the student was created with, by `create_model`: bare weights of the architecture
            `default_model_name` are built with these too.

    Returns:
        The teacher, or None for the spec 'none'; a Hub teacher's name has the commit that was loaded.

    Under torch.distributed all ranks call this, and fail together.

    Raises:
        AikdError: The teacher cannot be found, read or matched with the student.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    requested = specs if requested_spec is None else (
        [requested_spec] if isinstance(requested_spec, str) else list(requested_spec))
    if specs == ['none']:
        return None
    student = unwrap_model(student)
    options = _Options(
        model_name, default_model_name, model_args, dtype, size, mean, std, class_names if uses_classes else None,
        uses_classes)

    def load() -> list[Teacher]:
        with naming('`teacher`'):
            return [_load_one(*names, student, options) for names in zip(specs, requested, strict=True)]

    with torch.random.fork_rng(devices=[]):
        members = first_on_each_host(load)  # the first of a host downloads, the others find it in the cache
    return members[0] if len(members) == 1 else TeacherEnsemble(members)


def load_model(
        text: str,
        model_name: str | None = None,
        default_model_name: str | None = None,
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
) -> LoadedModel:
    """The model that a spec names, in eval mode.

    Args:
        text: A spec, but not 'none'.
        model_name: Architecture of a weights file, over the one that is stored in it.
        default_model_name: Architecture of a weights file that stores none.
        num_classes: Number of classes of a weights file that does not tell it.
        model_args: Arguments of `create_model` for bare weights of the architecture `default_model_name`.

    Raises:
        AikdError: It cannot be found or read, is no classifier, or has weights that are not finite.
    """
    spec = TeacherSpec.parse(text)
    if spec.kind == 'file':
        checkpoint = Checkpoint.read(spec.value)
        name = model_name or checkpoint.arguments.get('model') or default_model_name
        if name is None:
            raise AikdError(f'{text}: stores no architecture; name its architecture with `teacher_model`')
        own_args = model_args if name == default_model_name else None
        loaded = replace(build_model(checkpoint, name, num_classes, own_args), name=text)
    else:
        loaded = load_published(spec)
    if not loaded.model.num_classes:
        raise AikdError(f'{text}: has no classifier (num_classes is 0): choose a model that has one')
    _check_weights(text, loaded.model)
    loaded.model.eval()
    return loaded


def _check_weights(spec: str, model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # buffers with infinities can be masks
        if tensor.isnan().any() or (isinstance(tensor, nn.Parameter) and tensor.isinf().any()):
            raise AikdError(f'{spec}: its weights are not finite ({name}): choose an earlier checkpoint')


@dataclass(frozen=True)
class _Options:
    """Arguments of `load_teacher` that all teachers share."""
    model_name: str | None
    default_model_name: str | None
    model_args: dict[str, Any] | None
    dtype: str
    size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    class_names: Sequence[str] | None
    uses_classes: bool


def _load_one(spec: str, requested: str, student: nn.Module, options: _Options) -> Teacher:
    classes = class_count(student)
    loaded = load_model(spec, options.model_name, options.default_model_name, classes, options.model_args)
    _check_channels(spec, loaded.model, student)
    columns = None
    if options.uses_classes:
        columns = match_classes(
            spec, loaded.model.pretrained_cfg, loaded.model.num_classes, classes, options.class_names,
            origin=loaded.origin)
    scale, shift = _renormalisation(student, options.mean, options.std, loaded)
    weight = next(student.parameters())
    digest = weights_digest(loaded.model)
    network = folded(loaded.model)[0].to(weight.device, weight.dtype).to(memory_format=forward_layout(student))
    return Teacher(
        network,
        name=loaded.name,
        scale=scale,
        shift=shift,
        columns=None if columns is None else torch.tensor(columns),
        size=_input_size(spec, loaded, options.size),
        dtype=None if options.dtype == 'auto' else getattr(torch, options.dtype),
        given=requested if requested != loaded.name else None,
        digest=digest,
        stored_top1=None if loaded.checkpoint is None else loaded.checkpoint.top1,
    ).to(weight.device)


def _check_channels(spec: str, model: TimmModel, student: nn.Module) -> None:
    ours, theirs = (getattr(module, 'in_chans', None) for module in (student, model))
    if None not in (ours, theirs) and ours != theirs:
        raise AikdError(
            f'{spec}: has {theirs} input channels, the student has {ours}; they must be the same: train '
            f'or choose a teacher for this data set')


def _renormalisation(
        student: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        loaded: LoadedModel,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and shift from the student's normalisation to the teacher's; None where they are the same or unknown."""
    config, own = loaded.data_config or {}, getattr(student, 'pretrained_cfg', {})
    values = mean or own.get('mean'), std or own.get('std'), config.get('mean'), config.get('std')
    if not loaded.knows_normalisation:
        logger.info(f'AI-KD: {loaded.name} does not tell its normalisation: taken to be that of the student')
    if None in values or not loaded.knows_normalisation:
        return None, None
    channels = getattr(loaded.model, 'in_chans', 3)
    mean_s, std_s, mean_t, std_t = (_per_channel(value, channels) for value in values)
    if torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t):
        return None, None
    return (std_s / std_t).float(), ((mean_s - mean_t) / std_t).float()


def _per_channel(values: Any, channels: int) -> torch.Tensor:
    return torch.tensor(adapt_to_chs(tuple(values), channels), dtype=torch.float64).view(1, -1, 1, 1)


def _input_size(spec: str, loaded: LoadedModel, size: int | None) -> tuple[int, int] | None:
    """(height, width) that the input is resized to, None where it is taken as it comes."""
    fixed = _fixed_size(loaded)
    if size is None or fixed is None:
        return fixed if size is None else (size, size)
    if (size, size) != fixed and not _runs_at(loaded.model, size):
        raise AikdError(
            f'{spec}: takes {fixed[0]} x {fixed[1]} pixels only, not `teacher_size` {size}: leave the size out')
    return size, size


def _fixed_size(loaded: LoadedModel) -> tuple[int, int] | None:
    """(height, width) that the model insists on, or was trained at without knowing; None where it takes any."""
    model = loaded.model
    patches: Any = getattr(model, 'patch_embed', None)
    strict = getattr(patches, 'strict_img_size', None)
    if not model.pretrained_cfg.get('fixed_input_size') or strict is False:
        return None
    if strict:
        size = patches.img_size
    elif loaded.data_config is not None:
        size = loaded.data_config['input_size'][1:]
    else:
        size = loaded.model_args.get('img_size') or model.pretrained_cfg['input_size'][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


@torch.no_grad()
def _runs_at(model: TimmModel, size: int) -> bool:
    try:
        model(torch.zeros(1, getattr(model, 'in_chans', 3), size, size))
    except Exception:  # of a shape somewhere within
        return False
    return True
