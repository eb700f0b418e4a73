"""The teacher: frozen, checked against the student, fed as it was trained, answering with calibrated logits."""
import copy
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data.loader import adapt_to_chs
from timm.utils import unwrap_model

from . import AikdError
from .classes import class_count, match_classes
from .inference import fast_in_bfloat16, folded, forward_layout
from .ranks import first_on_each_host, gather_objects, sum_over_ranks
from .source import TimmModel, from_file, from_timm, naming, parse_spec, pinned

_logger = logging.getLogger(__name__)

TRIAL_SAMPLES = 1024  # over all ranks
_AGREEMENT = 0.995  # of the top-1
_CHANCE_LEVEL = 0.001


class Teacher(nn.Module):
    """A frozen model in eval mode that is fed the student's batch and answers with calibrated logits.

    Args:
        model: The pre-trained model; frozen here, its buffers never change.
        name: What to call it in messages.
        scale: Together with `shift` turns the student's normalised input into the model's, `x * scale + shift`,
            [1, channels, 1, 1]; None where both are normalised alike.
        shift: See `scale`.
        columns: For each of the student's classes, the model's class [C]; None where they are the same.
        size: (height, width) the batch is resized to; None takes it as it comes.
        dtype: Run in this dtype, outside autocast; None runs as the student does.
        trial: The same model in bfloat16, where that is faster: `settle` takes it if its answers are the model's.
        temperature: T_c, a number > 0: logits are divided by it; above 1 the teacher becomes less sure.
    """

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    columns: torch.Tensor | None
    _agreed: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            name: str = 'teacher',
            scale: torch.Tensor | None = None,
            shift: torch.Tensor | None = None,
            columns: torch.Tensor | None = None,
            size: tuple[int, int] | None = None,
            dtype: torch.dtype | None = None,
            trial: nn.Module | None = None,
            temperature: float = 1.,
    ):
        super().__init__()
        self.model = model.requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)
        self.trial = None if trial is None else trial.requires_grad_(False)
        self.name, self.size, self.dtype, self.temperature = name, size, dtype, temperature
        self.precision: str | None = None  # how the trial ended
        self._tried = 0  # samples that both have answered
        self.given: str | None = None  # the spec as the user gave it, where `name` is more exact
        self.register_buffer('scale', scale, persistent=False)
        self.register_buffer('shift', shift, persistent=False)
        self.register_buffer('columns', columns, persistent=False)
        self.register_buffer('_agreed', torch.zeros(()), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile the model, not this wrapper."""
        for model in filter(None, (self.model, self.trial)):
            model.compile(**kwargs)

    @torch.no_grad()  # inference_mode tensors could not be saved for the student's backward
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] / T_c in float32, in the student's class order, for the student's input."""
        scale, shift = self.scale, self.shift
        if scale is not None and shift is not None:
            input = (input * scale + shift).to(input.dtype)
        if self.size is not None and tuple(input.shape[-2:]) != self.size:
            input = F.interpolate(input.float(), self.size, mode='bicubic', antialias=True).to(input.dtype)
        logits = self._answer(self.model, input, self.dtype)
        if self.trial is not None:
            self._try(self.trial, input, logits)
        return logits / self.temperature if self.temperature != 1. else logits

    def _answer(self, model: nn.Module, input: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if dtype is not None:
            input = input.to(dtype)
        with torch.autocast(input.device.type, enabled=False) if dtype is not None else nullcontext():
            answer = model(input)
        logits: torch.Tensor = (answer[0] if isinstance(answer, (tuple, list)) else answer).float()
        return logits if self.columns is None else logits.index_select(-1, self.columns)

    def _try(self, trial: nn.Module, input: torch.Tensor, logits: torch.Tensor) -> None:
        if torch.is_autocast_enabled(input.device.type):
            self.trial = None  # the teacher runs in a lower precision as it is
            return
        self._tried += len(input)
        self._agreed += (self._answer(trial, input, torch.bfloat16).argmax(-1) == logits.argmax(-1)).sum()

    def settle(self) -> None:
        """Decide on the trial once it has answered for `TRIAL_SAMPLES` samples; on all ranks, waits for the device."""
        if self.trial is None:
            return
        agreed, tried = sum_over_ranks(torch.stack([self._agreed, self._agreed.new_tensor(self._tried)])).tolist()
        if tried < TRIAL_SAMPLES:
            return
        is_good = agreed >= _AGREEMENT * tried
        self.decide('bfloat16' if is_good else 'float32')
        _logger.info(
            f'AI-KD: the teacher {"goes on in bfloat16, faster here" if is_good else "stays in float32"}: '
            f'{100 * agreed / tried:.2f} % of {int(tried):,} samples have the same top-1 in both')


    def decide(self, precision: str) -> None:
        """End the trial with 'bfloat16' or 'float32'; a resumed run stays with what was decided."""
        if self.trial is not None:
            self.precision = precision
            if precision == 'bfloat16':
                self.model, self.dtype = self.trial, torch.bfloat16
            self.trial = None


def load_teacher(
        spec: str,
        student: nn.Module,
        *,
        model_name: str | None = None,
        default_model_name: str | None = None,
        dtype: str = 'auto',
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
) -> Teacher | None:
    """Load the teacher that a spec names and fit it to the student.

    The teacher keeps its own classes and channels: the channels must be the student's, and among the classes must be
    the student's, whose outputs are then picked. The global random streams are not touched.

    Args:
        spec: One of the forms of `--aikd-teacher`.
        student: The model to be trained; on its device the teacher will run.
        model_name: Architecture of a weights file, over the one that is stored in it.
        default_model_name: Architecture of a weights file that stores none.
        dtype: 'float32', 'bfloat16', 'float16' or 'auto': as the student; where that is float32 and the hardware is
            faster in bfloat16, that is tried and taken if at least 99.5 % of the top-1 stay the same.
        size: Height and width that the input is resized to; None: as it comes, or the teacher's fixed size.
        mean: What the student's input is normalised with, one value a channel (default: the student's config).
        std: See `mean`.
        class_names: The student's class names in the order of its outputs, where they are known.

    Returns:
        The teacher, or None for the spec 'none'; a Hub teacher's name has the commit that was loaded.

    Under torch.distributed all ranks call this, and fail together.

    Raises:
        AikdError: The teacher cannot be found, read or matched with the student.
    """
    if spec == 'none':
        return None
    student = unwrap_model(student)
    classes = class_count(student)

    def load() -> Teacher:
        with naming('--aikd-teacher'):
            kind, value = parse_spec(spec)
            if kind == 'file':
                model, config = from_file(value, model_name, default_model_name, classes)
            else:
                model, config = from_timm(kind, value, spec)
            model.eval()
            _check_channels(spec, model, student)
            columns = match_classes(
                spec, model.pretrained_cfg, model.num_classes, classes, class_names, is_published=kind != 'file')
        weight = next(student.parameters())
        scale, shift = _renormalisation(student, mean, std, config, getattr(model, 'in_chans', 3))
        input_size = _input_size(spec, model, config, size)
        network = folded(model)[0].to(weight.device, weight.dtype).to(memory_format=forward_layout(student))
        has_trial = dtype == 'auto' and weight.dtype == torch.float32 and fast_in_bfloat16(weight.device)
        return Teacher(
            network,
            name=pinned(spec),
            scale=scale,
            shift=shift,
            columns=None if columns is None else torch.tensor(columns),
            size=input_size,
            dtype=None if dtype == 'auto' else getattr(torch, dtype),
            trial=copy.deepcopy(network).bfloat16() if has_trial else None,
        ).to(weight.device)

    with torch.random.fork_rng(devices=[]):
        teacher = first_on_each_host(load)  # what the first has downloaded, the others find in the cache
    if not all(gather_objects(teacher.trial is not None)):
        teacher.trial = None  # hosts may differ
    return teacher


def better_than_chance(correct: int, count: int, num_classes: int) -> bool:
    """Whether guessing among C classes gets `correct` of `count` right with less than 0.1 % probability."""
    chance = 1 / num_classes
    log_tail = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(chance) + (count - k) * math.log1p(-chance)
        for k in range(correct, count + 1)
    ]
    return sum(map(math.exp, log_tail)) < _CHANCE_LEVEL


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


def _input_size(spec: str, model: TimmModel, config: dict[str, Any] | None, size: int | None) -> tuple[int, int] | None:
    """(height, width) that the input is resized to, None where it is taken as it comes."""
    fixed = _fixed_size(model, config)
    if size is None:
        return fixed
    if fixed is not None and getattr(model.patch_embed, 'strict_img_size', None) and (size, size) != fixed:
        raise AikdError(
            f'--aikd-teacher-size {size}: the teacher {spec} takes {fixed[0]} x {fixed[1]} pixels only: leave the size '
            f'out')
    return size, size


def _fixed_size(model: TimmModel, config: dict[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) that the model insists on, None where it takes any."""
    patches: Any = getattr(model, 'patch_embed', None)
    strict = getattr(patches, 'strict_img_size', None)  # None: the model keeps no size, but was trained at one
    if not model.pretrained_cfg.get('fixed_input_size') or strict is False:
        return None
    height, width = patches.img_size if strict else (config or model.pretrained_cfg)['input_size'][1:]
    return int(height), int(width)
