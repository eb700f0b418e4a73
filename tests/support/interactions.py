"""Runs a training script in this process, and compares what it does with the oracle."""
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch

from timm_aikd.features import FeatureTap
from timm_aikd.memory.indices import BatchIndices
from timm_aikd.run import AikdRun
from timm_aikd.script import autoload, bindings

from ..conftest import unwatch_parsers
from .oracle import RunOracle


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters['stats']['unique_graphs']


class Recorder:
    """What was seen of a run: its steps, each with the loss that the oracle expects."""

    def __init__(self):
        self.run: AikdRun | None = None
        self.steps: list[dict] = []
        self.expected: list[float] = []  # losses
        self.backward: list[float] = []  # what the script took the gradient of
        self.graphs: list[int] = []  # compiled so far, at the begin of each epoch
        self.oracle = RunOracle()
        self.student_input: torch.Tensor | None = None
        self.index: list[int] | None = None  # of the batch, where the memory is a store
        self.features: torch.Tensor | None = None  # of the batch, where D sees them

    def begin_epoch(self, run: AikdRun, epoch: int, hooks: bool) -> None:
        if hooks and self.run is None:
            run.student.register_forward_pre_hook(lambda *seen: self.see_input(*seen))  # copied as it is
        self.run = run
        self.graphs.append(compiled_graphs())
        self.oracle.begin_epoch(run.student, epoch)

    def see_input(self, module: torch.nn.Module, args: tuple) -> None:
        if module.training:
            self.student_input, = args

    def check(self, run: AikdRun, input, output, target, result: dict) -> None:
        """Compare a step's loss with the oracle's, and note what the step was like."""
        assert self.student_input is None or input is self.student_input, 'another batch than the student\'s'
        expected = self.oracle.loss(run, input, output, target, self.index, self.features).float()
        exact = output.dtype == torch.float32
        torch.testing.assert_close(
            result['loss'].float(), expected, rtol=1e-3 if exact else 2e-2, atol=1e-3 if exact else 1e-2)
        self.expected.append(expected.item())
        self.steps.append({
            'epoch': self.oracle.epoch, 'size': len(output), 'image': input.shape[-1], 'channels': input.shape[1],
            'soft': target.ndim == 2, 'dtype': input.dtype, 'output': output.dtype, 'target': target})

    def check_backward(self, accumulate: int = 1) -> None:
        """The script took the gradients of these losses, each divided by the number of batches of its update."""
        assert len(self.backward) == len(self.expected) > 0
        exact = self.steps[0]['output'] == torch.float32
        divisors = []
        for epoch in sorted({step['epoch'] for step in self.steps}):
            batches = sum(step['epoch'] == epoch for step in self.steps)
            divisors += [min(accumulate, batches - i // accumulate * accumulate) for i in range(batches)]
        for ours, expected, divisor in zip(self.backward, self.expected, divisors, strict=True):
            assert ours * divisor == pytest.approx(expected, rel=1e-3 if exact else 2e-2, abs=1e-3 if exact else 1e-2)

    def watch(self, patched: pytest.MonkeyPatch, hooks: bool = True) -> None:
        """Patch what a run calls, to see it; without hooks on the student, which would be compiled."""
        loss, begin_epoch, of_batch = AikdRun.loss, AikdRun.begin_epoch, BatchIndices.of_batch
        backward, take = torch.Tensor.backward, FeatureTap.take

        def watched_take(tap):
            features = take(tap)
            if tap.name == 'the student':
                self.features = features.detach()
            return features

        def watched_loss(run, input, output, target, *args, **kwargs):
            self.index = None
            result = loss(run, input, output, target, *args, **kwargs)
            self.check(run, input, output, target, result)
            return result

        def watched_begin_epoch(run, epoch, *args, **kwargs):
            begin_epoch(run, epoch, *args, **kwargs)
            self.begin_epoch(run, epoch, hooks)

        def watched_of_batch(indices, size):
            index = of_batch(indices, size)
            self.index = index.tolist()
            return index

        def watched_backward(tensor, *args, **kwargs):
            self.backward.append(tensor.item())
            backward(tensor, *args, **kwargs)

        patched.setattr(AikdRun, 'loss', watched_loss)
        patched.setattr(AikdRun, 'begin_epoch', watched_begin_epoch)
        patched.setattr(FeatureTap, 'take', watched_take)
        patched.setattr(BatchIndices, 'of_batch', watched_of_batch)
        patched.setattr(torch.Tensor, 'backward', watched_backward)


def load(path: Path):
    """The script as a module of its own, whatever was loaded before."""
    spec = importlib.util.spec_from_file_location(f'script_{path.parent.name.replace(".", "_")}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drive(script: Path, words: list, monkeypatch, caplog, recorder: Recorder | None = None) -> None:
    """The script's main(), in this process, with these arguments."""
    caplog.set_level(logging.INFO)
    root = logging.getLogger()
    handlers, hook, names = list(root.handlers), sys.excepthook, {}
    with monkeypatch.context() as patched:
        if recorder is not None:
            recorder.watch(patched, hooks='--torchcompile' not in words)
        patched.setattr(sys, 'argv', [str(script), *map(str, words)])
        autoload.watch_parsers()
        try:
            module = load(script)
            names = module.__dict__
            module.main()
        finally:
            unwatch_parsers()
            bindings.restore(names)
            sys.excepthook, root.handlers[:] = hook, handlers
