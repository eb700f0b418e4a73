"""BatchNorm folded into the convolution before it, for networks that only run forward."""
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.norm_act import SyncBatchNormAct
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # exactly: subclasses may do more to their weights
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)

Pairs = list[tuple[str, str]]


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _NORMS) or super().is_leaf_module(module, name)


def foldable(model: nn.Module) -> Pairs:
    """Names of each BatchNorm's convolution and of itself, where nothing else sees what is between the two.

    Args:
        model: In eval mode; one that cannot be traced has none.
    """
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # control flow that depends on data, of as many kinds as there are models
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in nodes if node.op == 'call_module')
    return [
        pair for pair in filter(None, map(_in_a_row, nodes))
        if all(calls[name] == 1 for name in pair) and _can_fold(*(modules[name] for name in pair))]


def _in_a_row(node: torch.fx.Node) -> tuple[str, str] | None:
    """Names of two modules, the second of which alone sees the output of the first."""
    before = node.args[0] if node.op == 'call_module' and node.args else None
    if isinstance(before, torch.fx.Node) and before.op == 'call_module' and len(before.users) == 1:
        return str(before.target), str(node.target)
    return None


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    is_pair = type(convolution) in _CONVOLUTIONS and type(norm) in _NORMS
    return is_pair and norm.running_var is not None and not _is_more(convolution) and not _is_more(norm)


def _is_more(layer: nn.Module) -> bool:
    """Whether hooks, such as those of weight and spectral norm, do what the forward of its class does not show."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or 'weight' not in layer._parameters


@torch.no_grad()
def fold_(model: nn.Module, pairs: Pairs) -> None:
    """Take the BatchNorms out, in place; `load_folded_` gives the convolutions their new weights."""
    for convolution, norm in pairs:
        layer: Any = model.get_submodule(convolution)
        old: Any = model.get_submodule(norm)
        layer.bias = nn.Parameter(layer.weight.new_empty(layer.out_channels), requires_grad=False)
        layer.weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
        activation = nn.Sequential(old.drop, old.act) if hasattr(old, 'act') else nn.Identity()
        parent, _, name = norm.rpartition('.')
        setattr(model.get_submodule(parent), name, activation.eval())


@torch.no_grad()
def load_folded_(model: nn.Module, pairs: Pairs, source: nn.Module) -> None:
    """Overwrite a folded model's weights in place with those of the model it was folded from."""
    if not pairs:
        model.load_state_dict(source.state_dict())
        return
    state, modules = source.state_dict(), dict(source.named_modules())
    own = model.state_dict()
    for convolution, norm in pairs:
        folds = fuse_conv_bn_weights(
            state[f'{convolution}.weight'], state.get(f'{convolution}.bias'), state[f'{norm}.running_mean'],
            state[f'{norm}.running_var'], modules[norm].eps, state.get(f'{norm}.weight'), state.get(f'{norm}.bias'))
        for name, tensor in zip(('weight', 'bias'), folds, strict=True):
            own.pop(f'{convolution}.{name}').copy_(tensor)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def folded(model: nn.Module) -> tuple[nn.Module, Pairs]:
    """The same model without the BatchNorms that can be folded, if it answers as before.

    Args:
        model: In eval mode, float32, with timm's `pretrained_cfg` to tell its input; left as it is.

    Returns:
        A new module, which shares with the model the tensors that are not folded, and the pairs that were; the model
        itself where there are none.
    """
    config = getattr(model, 'pretrained_cfg', {})
    size, stem = config.get('input_size'), dict(model.named_parameters()).get(f'{config.get("first_conv")}.weight')
    if not size or next(model.parameters()).dtype != torch.float32:
        return model, []
    try:
        pairs = foldable(_structure(model, _without_data))  # a trace leaves marks, and is kept for a while
    except RuntimeError:  # of weight_norm: cannot be copied
        return model, []
    if not pairs:
        return model, []
    copied = _structure(model, lambda tensor: tensor)
    fold_(copied, pairs)
    load_folded_(copied, pairs, model)
    channels = size[0] if stem is None else stem.shape[1]
    input = torch.randn(2, channels, *size[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        expected, answer = (_in_double(each, input) for each in (model, copied))
    except Exception:  # a model of another size, or that keeps tensors where nobody finds them
        return model, []
    close = (answer - expected).abs().max() <= 1e-4 * expected.abs().max()
    return (copied, pairs) if close else (model, [])


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _structure(model: nn.Module, new: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of the modules, with other tensors or the same."""
    return copy.deepcopy(model, {id(tensor): new(tensor) for tensor in _tensors(model).values()})


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to('meta')
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@torch.no_grad()
def _in_double(model: nn.Module, input: torch.Tensor) -> torch.Tensor:
    # in float32 a GPU may compute in TF32, whose errors are larger than those looked for; its memory may be full
    tensors = {
        name: tensor.to('cpu', torch.float64 if tensor.is_floating_point() else None)
        for name, tensor in _tensors(model).items()}
    answer = torch.func.functional_call(model, tensors, (input,))
    logits: torch.Tensor = answer[0] if isinstance(answer, (tuple, list)) else answer
    return logits
