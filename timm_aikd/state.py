"""What a checkpoint keeps of AI-KD: one schema, which the writer and all readers share."""
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .errors import AikdError

VERSION = 1
KEY = 'aikd'  # in a task's state


@dataclass
class SavedState:
    """The entries of a state, as plain containers and tensors; None stands for an entry that is not there.

    Attributes:
        config: The options, as `AikdConfig.to_dict` gives them.
        epoch: The last epoch begun.
        teacher_temperature: T_c, where it was fitted.
        teacher_metrics: Of the calibrated teacher on the images of that fit: top1, nll, ece, aurc, samples.
        teacher_given: The teacher's spec, or specs, as the user wrote them, where the run has pinned a commit.
        teacher_digest: Digest of the teacher's weights.
        memory: The prediction memory's file: name, folder, epoch, digest.
        binary: Whether the discriminator saw independent probabilities.
        discriminator: Its weights, optimizer and random stream.
        class_names: The classes' names, in the order of the outputs.
    """

    config: dict[str, Any]
    epoch: int = 0
    teacher_temperature: float | None = None
    teacher_metrics: dict[str, float] | None = None
    teacher_given: str | list[str] | None = None
    teacher_digest: str | None = None
    memory: dict[str, Any] | None = None
    binary: bool | None = None
    discriminator: dict[str, Any] | None = None
    class_names: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `torch.save`; `torch.load(weights_only=True)` reads it."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {'version': VERSION, **{name: value for name, value in entries.items() if value is not None}}

    @classmethod
    def from_dict(cls, state: Any) -> 'SavedState':
        """Read what `to_dict` wrote, of this or an older version of the package.

        Raises:
            AikdError: It is something else, of a newer version, or damaged.
        """
        if not isinstance(state, dict):
            raise AikdError(
                f'AI-KD: the checkpoint\'s AI-KD state is {state!r:.80}, not a dict: resume from another checkpoint')
        version = state.get('version')
        if not is_plain(version) or version != VERSION:
            raise AikdError(
                f'AI-KD: the checkpoint\'s state has version {version!r:.80}, this package reads {VERSION}: install '
                f'the timm-aikd that wrote it')
        entries = {name: state[name] for name in _CHECKS if name in state}
        for name, value in {'config': None, **entries}.items():
            required = name in ('config', 'epoch')
            if (required or value is not None) and not _CHECKS[name](value):
                raise AikdError(
                    f'AI-KD: the checkpoint\'s state is damaged ({name} {value!r:.80}): resume from another checkpoint')
        return cls(**entries)

    @classmethod
    def of_checkpoint(cls, checkpoint: Any) -> 'SavedState | None':
        """The AI-KD state in a checkpoint of a training script; None where there is none.

        Raises:
            AikdError: There is one, of a newer version or damaged.
        """
        task_state = checkpoint.get('task_state') if isinstance(checkpoint, dict) else None
        if not isinstance(task_state, dict) or KEY not in task_state:
            return None
        return cls.from_dict(task_state[KEY])


def is_plain(value: Any) -> bool:
    """Whether `==` gives a bool: it does not for a tensor."""
    return value is None or isinstance(value, (int, float, str)) or (
        isinstance(value, (list, tuple)) and all(map(is_plain, value)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and is_plain(value[key]) for key in value)


def _is_temperature(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and isinstance(value[key], (int, float)) for key in value)


def _is_memory(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get('epoch'), int) and all(
        _is_text(value.get(key)) for key in ('name', 'folder', 'digest'))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    'config': _is_config,
    'epoch': lambda value: isinstance(value, int),
    'teacher_temperature': _is_temperature,
    'teacher_metrics': _is_metrics,
    'teacher_given': lambda value: _is_text(value) or _is_names(value),
    'teacher_digest': _is_text,
    'memory': _is_memory,
    'binary': lambda value: isinstance(value, bool),
    'discriminator': lambda value: isinstance(value, dict),
    'class_names': _is_names,
}
