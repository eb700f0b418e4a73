"""Temperature scaling and calibration metrics of a data set's predictions, in float64 on the CPU."""
import math

import torch
import torch.nn.functional as F

TEMPERATURE_RANGE = (0.1, 10.)


def fit_temperature(logits: torch.Tensor, target: torch.Tensor, binary: bool = False) -> float:
    """The T of least NLL for logits / T (https://arxiv.org/abs/1706.04599), within `TEMPERATURE_RANGE`.

    NLL is convex in 1 / T, so a bisection of its slope finds the minimum.

    Args:
        logits: Uncalibrated logits [N, C].
        target: Class indices [N].
        binary: NLL of C independent probabilities rather than of one distribution.
    """
    logits = logits.detach().cpu().double()
    target = target.cpu()
    one_hot = F.one_hot(target, logits.shape[-1]).to(logits.dtype)

    def slope(inverse: float) -> float:
        probs = (logits * inverse).sigmoid() if binary else (logits * inverse).softmax(-1)
        return ((probs - one_hot) * logits).sum(-1).mean().item()

    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    for _ in range(40):
        middle = (low + high) / 2
        if slope(math.exp(-middle)) > 0:  # too sure of itself: a larger temperature lowers the NLL
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def reliability_bins(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        bins: int = 15,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share of samples, mean confidence and accuracy, [bins] each, of equal-width bins (lo, hi]; empty bins are 0.

    Args:
        confidence: Probability of the predicted class [N], 0 to 1.
        correct: Whether the predicted class is the label [N].
        bins: Number of bins.
    """
    confidence, correct = confidence.cpu().double(), correct.cpu().double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    zeros = confidence.new_zeros(bins)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    filled = count.clamp(min=1)
    return (
        count / max(len(confidence), 1),
        zeros.index_add(0, index, confidence) / filled,
        zeros.index_add(0, index, correct) / filled,
    )


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """ECE (https://arxiv.org/abs/1706.04599): mean |accuracy - confidence| over the bins, in percent."""
    share, mean_confidence, accuracy = reliability_bins(confidence, correct, bins)
    return 100 * (share * (accuracy - mean_confidence).abs()).sum().item()


def area_under_risk_coverage(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """AURC (https://arxiv.org/abs/1805.08206), times 1000: error rate among the k most confident, averaged over k.

    The order among equally confident samples is undefined, so the error is averaged over their orders.
    """
    confidence, order = confidence.cpu().double().sort(descending=True)
    wrong = 1 - correct.cpu().double()[order]
    _, group, size = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    share = torch.zeros(len(size), dtype=wrong.dtype, device=wrong.device).index_add(0, group, wrong) / size
    errors: torch.Tensor = share[group].cumsum(0)
    coverage = torch.arange(1, len(errors) + 1, device=errors.device)
    return 1000 * (errors / coverage).mean().item()
