"""Compiled tasks: the numbers of an eager one, no compilation after the first epochs, CUDA graphs."""
import pytest
import torch
import torch.nn as nn
from torch._dynamo import lookup_backend

from timm_aikd import AikdTask, RecordFormat, StoreMemory

from .common import CLASSES, Setting, conv_net, descend, given, images

EPOCHS, STEPS = 4, 3


class Counting:
    """A backend that counts its graphs: inductor on a GPU, elsewhere the part of it that needs no compiler."""

    def __init__(self, device):
        self.graphs = 0
        self.backend = lookup_backend('inductor' if device.type == 'cuda' else 'aot_eager')

    def __call__(self, graph, inputs, **kwargs):
        self.graphs += 1
        return self.backend(graph, inputs)


def losses(device, memory, setting, after_epoch=lambda: None, disc_input='log-probs', **compile_options):
    torch._dynamo.reset()
    config = given(memory=memory, adv_warmup=3., alpha=0.5, disc_input=disc_input)
    task = AikdTask(
        setting.place(conv_net(), device), nn.CrossEntropyLoss(), teacher=setting.place(conv_net(1), device),
        config=config, epochs=EPOCHS, device=device, verbose=False)
    if memory == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), 8 * STEPS, device=device))
    if compile_options:
        task.compile(**compile_options)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
    found = []
    for epoch in range(EPOCHS):
        task.begin_epoch(epoch)
        for step in range(STEPS):
            input, target = images(step)
            index = (torch.arange(8 * step, 8 * step + 8),) if memory == 'store' else ()
            with setting.autocast(device):
                loss = task(setting.place(input, device), target.to(device), *index)['loss']
            found.append(descend(optimizer, loss).item())
        task.end_epoch()
        after_epoch()
    return found


@pytest.mark.parametrize('memory, setting, disc_input', [
    ('store', Setting(torch.float32), 'log-probs'),
    ('snapshot', Setting(torch.bfloat16, channels_last=True), 'features'),
], ids=str)
def test_epochs_alpha_and_warm_up_compile_nothing_anew(device, memory, setting, disc_input):
    backend, graphs = Counting(device), []
    compiled = losses(
        device, memory, setting, lambda: graphs.append(backend.graphs), disc_input=disc_input, backend=backend)
    networks = 1 if disc_input == 'features' else 2  # student; with features the teacher stays eager
    expected = [networks + (memory == 'snapshot' and epoch > 0) for epoch in range(4)]  # snapshot in epoch 1
    assert graphs == expected
    eager = losses(device, memory, setting, disc_input=disc_input)
    assert compiled == pytest.approx(eager, rel=3e-2)  # TF32 in other places


@pytest.mark.parametrize('memory', ['store', 'snapshot'])
def test_cuda_graphs_give_the_numbers_of_an_eager_run(device, on_gpu, memory):
    setting = Setting(torch.float32)
    graphs = losses(device, memory, setting, backend='inductor', mode='reduce-overhead')
    assert graphs == pytest.approx(losses(device, memory, setting), rel=1e-2)
