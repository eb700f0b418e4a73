"""Copies from the device that nobody waits for."""
import numpy as np
import torch


class Arriving:
    """Records on their way from the device to the host; on CUDA through pinned memory.

    Args:
        index: Dataset indices [B] of the records.
        records: Records as bytes [B, bytes].
    """

    def __init__(self, index: np.ndarray, records: torch.Tensor):
        self.index = index
        self.event: torch.cuda.Event | None = None
        if records.device.type == 'cuda':
            self.bytes = torch.empty(records.shape, dtype=records.dtype, pin_memory=True)
            self.bytes.copy_(records, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(records.device))
        else:
            self.bytes = records.cpu()

    def is_there(self) -> bool:
        """Whether the copy is done."""
        return self.event is None or self.event.query()

    def take(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Indices [B] and records [B]; waits until the copy is done."""
        if self.event is not None:
            self.event.synchronize()
        return self.index, self.bytes.numpy().view(dtype).squeeze(-1)
