"""Several teachers as one: the mean of their probabilities."""
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ranks import logger
from .teacher import Teacher


class TeacherEnsemble(Teacher):
    """Answers with the log of the members' mean probabilities, divided by T_c.

    Each member has its own normalisation, size and classes; features are the first one's.

    Args:
        members: Two teachers or more.
    """

    def __init__(self, members: Sequence[Teacher]):
        super().__init__(nn.ModuleList(members), name=' + '.join(member.name for member in members))
        self.members = list(members)
        self._is_binary = False
        digests = [member.digest for member in members]
        if len(set(digests)) < len(members):
            logger.warning(f'AI-KD: teachers {self.name}: some have the same weights, which only costs time')
        parameters = sum(parameter.numel() for parameter in self.parameters())
        size = sum(parameter.nbytes for parameter in self.parameters())
        logger.info(
            f'AI-KD: {len(members)} teachers, together {parameters / 1e6:.1f} million weights, {size / 1e6:,.0f} MB: '
            f'the mean of their probabilities; each costs a forward a step')

    @property
    def specs(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.name for member in self.members)

    @property
    def digest(self) -> str:
        """Of all members' digests."""
        return hashlib.sha256(''.join(member.digest for member in self.members).encode()).hexdigest()

    @property
    def given(self) -> list[str] | None:
        """The specs as the user gave them, where a name is more exact."""
        if not any(member.given for member in self.members):
            return None
        return [str(member.given or member.name) for member in self.members]

    def use_sigmoid(self, binary: bool) -> None:
        """Whether a prediction is C independent probabilities (BCE) rather than one distribution."""
        self._is_binary = binary

    def compile(self, **kwargs: Any) -> None:
        """Compile each member's model."""
        for member in self.members:
            member.compile(**kwargs)

    def watch_features(self) -> int:
        """Keep the first member's features; see `Teacher.watch_features`."""
        return self.members[0].watch_features()

    def take_features(self) -> torch.Tensor:
        """The first member's features; see `Teacher.take_features`."""
        return self.members[0].take_features()

    def features(self, input: torch.Tensor) -> torch.Tensor:
        """The first member's features; the others do not run."""
        return self.members[0].features(input)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] / T_c in float32, in the student's class order, for the student's input."""
        return mean_logits([member(input) for member in self.members], self._is_binary) / self.temperature


def mean_logits(logits: Sequence[torch.Tensor], binary: bool) -> torch.Tensor:
    """Logits whose probabilities are the mean of those of several logits [B, C]."""
    stacked = torch.stack(list(logits)).float()
    if not binary:
        return stacked.log_softmax(-1).logsumexp(0) - math.log(len(stacked))
    # logit(mean of p) = log(sum of p) - log(sum of 1 - p), without 1 - p underflowing
    return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
