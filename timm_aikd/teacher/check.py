"""A teacher no better than chance on the training images stops the run."""
import math

import torch
import torch.nn as nn

from ..errors import AikdError
from ..ranks import sum_over_ranks, world_size

SAMPLES = 1024  # training samples, over all ranks, on which the teacher is judged
_LEVEL = 1e-3  # probability with which guessing would get that many right


class ChanceCheck(nn.Module):
    """Counts what the teacher gets right on the first `SAMPLES` training samples, and then judges it once.

    Args:
        name: The teacher's, for the message.
        num_classes: Number of classes C.
        device: Where the student runs.
    """

    correct: torch.Tensor

    def __init__(self, name: str, num_classes: int, device: torch.device | None = None):
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.seen = 0
        self.is_done = False
        self.register_buffer('correct', torch.zeros((), device=device), persistent=False)

    def forward(self, correct: torch.Tensor) -> None:
        """Count a batch: 1 for each sample [B] that the teacher gets right.

        Raises:
            AikdError: The teacher is no better than chance.
        """
        if self.is_done:
            return
        self.correct += correct.sum()
        self.seen += len(correct)
        if self.seen * world_size() >= SAMPLES:
            counts = torch.stack([self.correct, self.correct.new_tensor(float(self.seen))])
            self.judge(*map(int, sum_over_ranks(counts).tolist()))  # the only synchronisation of the first epoch

    def judge(self, correct: int, count: int) -> None:
        """Judge the teacher by what it got right on `count` training samples.

        Raises:
            AikdError: The teacher is no better than chance.
        """
        self.is_done = True
        if not better_than_chance(correct, count, self.num_classes):
            raise AikdError(
                f'AI-KD: teacher {self.name} is right on {100 * correct / count:.1f} % of the first {count} training '
                f'samples, no better than chance ({100 / self.num_classes:.1f} %): wrong class order or a broken '
                f'checkpoint; check the `teacher` and the data set\'s --class-map')


def better_than_chance(correct: int, count: int, num_classes: int) -> bool:
    """Whether guessing among C classes gets `correct` of `count` right with less than 0.1 % probability."""
    k = torch.arange(correct, count + 1, dtype=torch.float64)
    guesses = torch.distributions.Binomial(count, torch.tensor(1 / num_classes, dtype=torch.float64))
    return math.exp(guesses.log_prob(k).logsumexp(0).item()) < _LEVEL
