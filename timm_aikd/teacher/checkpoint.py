"""A weights file or a checkpoint of a run, read once, as tensors and plain containers only."""
import argparse
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict

from ..errors import AikdError

Weights = dict[str, torch.Tensor]

# weights of timm's checkpoints, best first, then where other training code keeps them
_TIMM_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_OTHER_KEYS = ('ema_state_dict', 'model_state_dict', 'net', 'module', 'network', 'weights')


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Args:
        path: Of the file.
        weights: State dict of the model; of the moving average where that was validated.
        arguments: Of the training script; empty for bare weights.
        rest: All else but the optimizer.
    """
    path: str
    weights: Weights
    arguments: dict[str, Any]
    rest: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> 'Checkpoint':
        """Read a file; never unpickles code.

        Raises:
            AikdError: Not readable, not a checkpoint, or one that needs more than tensors and plain containers.
        """
        try:
            content: Any = safetensors.torch.load_file(path) if _is_safetensors(path) else load_checkpoint(path)
        except Exception as error:  # of pickle, zip, safetensors or the file system
            raise AikdError(
                f'{path}: not readable as weights, truncated, or more than tensors and plain containers, '
                f'which is never unpickled ({type(error).__name__}); save it again or as .safetensors') from error
        if not isinstance(content, dict):
            raise AikdError(f'{path}: holds no state dict; save the weights as model.state_dict()')
        args = content.get('args')
        arguments = dict(vars(args)) if isinstance(args, argparse.Namespace) else {}
        key = _weights_key(content, arguments)
        weights = _checked(path, content if key is None else content[key])
        rest = {} if key is None else {
            name: value for name, value in content.items()
            if name not in ('args', 'optimizer', *_TIMM_KEYS, *_OTHER_KEYS)}
        return cls(path, weights, arguments, rest)

    @property
    def top1(self) -> float | None:
        """Top-1 on the run's validation images, percent, where that is what the run selected checkpoints by."""
        metric = self.rest.get('metric')
        is_top1 = self.arguments.get('eval_metric') == 'top1'
        return float(metric) if is_top1 and isinstance(metric, (int, float)) else None

    @property
    def class_names(self) -> list[str] | None:
        """Names by output, where a run with AI-KD has kept them."""
        try:
            names = self.rest['task_state']['aikd']['class_names']
        except (KeyError, TypeError, IndexError):
            return None
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def load_checkpoint(path: str) -> Any:
    """A file of torch.save, tensors and plain containers only."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its arguments so
        return torch.load(path, map_location='cpu', weights_only=True)


def _is_safetensors(path: str) -> bool:
    """Whether the file begins as safetensors do: eight bytes of length, then JSON."""
    with open(path, 'rb') as file:
        return file.read(9)[8:] == b'{'


def _weights_key(content: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """Key of the weights; None where the file itself is the state dict."""
    keys = _TIMM_KEYS
    if arguments.get('model_ema_force_cpu'):
        keys = keys[::-1]  # that average was not the model that was validated
    return next((key for key in (*keys, *_OTHER_KEYS) if isinstance(content.get(key), dict)), None)


def _checked(path: str, weights: dict[Any, Any]) -> Weights:
    is_state_dict = weights and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items())
    if not is_state_dict:
        keys = ', '.join(map(str, weights))[:60]
        raise AikdError(
            f'{path}: holds no state dict{f" (its keys: {keys})" if keys else ""}; save the weights as '
            f'model.state_dict()')
    # --split-bn: the main statistics are those of the evaluation
    return {key: value for key, value in clean_state_dict(weights).items() if '.aux_bn.' not in key}
