"""Networks that only run forward, the teacher and the snapshot, made cheaper: what they are changed to, and layout."""
import torch
import torch.nn as nn

from .folding import Pairs as Pairs  # the package knows folding.py by these names only
from .folding import folded as folded
from .folding import load_folded_ as load_folded_


def forward_layout(student: nn.Module) -> torch.memory_format:
    """For a network beside the student: channels-last where that is known to be faster, on the CPU, or as it has it."""
    for parameter in student.parameters():
        is_last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        if parameter.device.type == 'cpu' or (is_last and not parameter.is_contiguous()):
            return torch.channels_last
    return torch.preserve_format
