"""What is kept of a prediction: one packed record a sample, made and read where the student runs."""
import numpy as np
import torch
import torch.nn.functional as F

from ..errors import AikdError

DENSE_CLASSES = 1024  # up to here all classes are kept by default
DEFAULT_TOPK = 128  # above


class RecordFormat:
    """Turns predictions into records and back.

    A record is a version (when it was written; 0: never), the label, and the log-probabilities of all classes or,
    where K is smaller than their number, of the K largest with their class ids; the rest of the mass is then spread
    evenly over the other classes. With a BCE criterion logits take the place of log-probabilities, and the other
    classes are taken as impossible. Log-probabilities because a temperature applied later needs the small ones, which
    float16 probabilities flush to zero.

    Args:
        num_classes: Number of classes C.
        topk: Predictions kept a sample, K, 1 to C; None: C up to 1,024 classes, else 128.
        binary: The criterion is a BCE.
        dtype: Of the values kept.

    Raises:
        AikdError: `topk` is out of range.
    """

    def __init__(
            self,
            num_classes: int,
            topk: int | None = None,
            binary: bool = False,
            dtype: torch.dtype = torch.float16,
    ):
        if topk is None:
            topk = num_classes if num_classes <= DENSE_CLASSES else DEFAULT_TOPK
        if not 1 <= topk <= num_classes:
            raise AikdError(f'`memory_topk` {topk}: allowed is 1 to the number of classes, {num_classes}')
        self.num_classes, self.topk, self.binary, self.dtype = num_classes, topk, binary, dtype
        self.is_dense = topk == num_classes
        self.id_dtype = torch.int16 if num_classes <= 2 ** 15 else torch.int32
        ids = [] if self.is_dense else [('ids', f'<i{self.id_dtype.itemsize}', (topk,))]
        self.numpy = np.dtype([('version', '<i8'), ('label', '<i4'), *ids, ('values', f'<f{dtype.itemsize}', (topk,))])
        self._fields = dict(self.numpy.fields or {})

    def encode(self, logits: torch.Tensor, target: torch.Tensor, version: int) -> torch.Tensor:
        """Records as bytes [B, bytes] of logits [B, C] and class indices [B]; one with a NaN begins with a NaN."""
        values = logits.float()
        parts = [torch.full((len(values), 1), version, device=values.device), target[:, None].to(torch.int32)]
        if not self.is_dense:
            total = 0. if self.binary else values.logsumexp(-1, keepdim=True)
            values, ids = values.topk(self.topk, sorted=False)
            values = values - total
            parts.append(ids.to(self.id_dtype))
        elif not self.binary:
            values = F.log_softmax(values, dim=-1)
        values = values.to(self.dtype)  # what overflows has the probability 0, or with a BCE 0 or 1: no harm
        if self.binary or not self.is_dense:  # else a softmax has spread the NaN
            values = values.masked_fill(values.isnan().any(-1, keepdim=True), torch.nan)
        return torch.cat([part.contiguous().view(torch.uint8) for part in (*parts, values)], dim=-1)

    def decode(self, records: torch.Tensor) -> torch.Tensor:
        """Log q [B, C] of records as bytes [B, bytes]; where none was ever written, anything but NaN."""
        values = self._field(records, 'values', self.dtype).float()
        if self.is_dense:
            return values
        ids = self._field(records, 'ids', self.id_dtype).long()
        if self.binary:
            rest = torch.full_like(values[:, :1], -torch.inf)
        else:
            left = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=0)  # rounding can take it below
            rest = (left / (self.num_classes - self.topk)).log()
        return rest.repeat(1, self.num_classes).scatter_(-1, ids, values)

    def _field(self, records: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        kind, start = self._fields[name][:2]
        # a copy, for views of other dtypes need aligned rows; contiguous() does not copy where B = 1
        return records[:, start:start + kind.itemsize].clone(memory_format=torch.contiguous_format).view(dtype)

    def describe(self) -> str:
        """The content of a record in words, for logs and for files."""
        kind = 'logits' if self.binary else 'log-probabilities'
        return f'{self.topk} of {self.num_classes} {kind} in {str(self.dtype).removeprefix("torch.")}'


def version_at(epoch: int, step: int, rank: int) -> int:
    """When a record is written, in one number that grows with time; steps and ranks of an epoch from 0."""
    return (epoch + 1) << 40 | step << 16 | rank
