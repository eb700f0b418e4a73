"""Where the tests of this folder run: on a GPU, or on the device that AIKD_TEST_DEVICE names."""
import os
from pathlib import Path

import pytest
import torch

from .common import Setting

DEVICE = os.environ.get('AIKD_TEST_DEVICE') or ('cuda' if torch.cuda.is_available() else None)


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.cuda)
    if DEVICE is None and ours:  # one line for all
        reason = f'no GPU for {len(ours)} tests; AIKD_TEST_DEVICE=cpu runs their logic without one'
        ours[0].add_marker(pytest.mark.skip(reason))
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]


@pytest.fixture(scope='session')
def device():
    return torch.device(DEVICE)


@pytest.fixture
def on_gpu(device):
    """Skips a test of something that only a GPU has."""
    if device.type != 'cuda':
        pytest.skip('needs a GPU')


@pytest.fixture(params=[
    Setting(torch.float32), Setting(torch.float32, channels_last=True), Setting(torch.bfloat16),
    Setting(torch.bfloat16, channels_last=True), Setting(torch.float16, channels_last=True)], ids=str)
def setting(request, device):
    """A precision and a memory layout."""
    return request.param
