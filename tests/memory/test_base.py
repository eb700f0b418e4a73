"""What both memories can be asked, so that nobody asks which one it is."""
import inspect

import pytest
import torch

from timm_aikd import SnapshotMemory
from timm_aikd.memory import Memory

from .helpers import predictions, store

VERBS = 'compile', 'begin_epoch', 'recall', 'record', 'end_epoch', 'save', 'get_state', 'load_state', 'describe'


@pytest.mark.parametrize('make, has_state', [(SnapshotMemory, False), (store, True)])
def test_an_epoch_is_the_same_calls_for_both(tiny_net, tmp_path, make, has_state):
    student, index = tiny_net().eval(), torch.tensor([3, 1, 0, 2]).numpy()
    input, target = torch.randn(4, 4), predictions()[1]
    memory: Memory = make()
    memory.compile()
    memory.begin_epoch(0, student)
    memory.record(index, student(input).detach(), target)
    memory.end_epoch()
    memory.save(tmp_path)
    state = memory.get_state()
    assert (state is not None) == has_state == bool(list(tmp_path.iterdir()))
    resumed: Memory = make()
    resumed.load_state(state, [tmp_path])
    resumed.begin_epoch(1, student)
    past, known = resumed.recall(input, index)
    assert known is None
    torch.testing.assert_close(past.softmax(-1), student(input).detach().softmax(-1), rtol=2e-3, atol=0)
    assert memory.describe().startswith(memory.name)


def test_a_memory_needs_no_more_than_recall(tmp_path):
    class Uniform(Memory):
        def recall(self, input, index):
            return torch.zeros(len(input), 5), None

    memory = Uniform()
    memory.begin_epoch(0, torch.nn.Identity(), None)
    memory.record(None, *predictions())
    memory.end_epoch()
    memory.save(tmp_path)
    memory.load_state({'name': 'x'}, [tmp_path])
    assert memory.get_state() is None and memory.describe() == '' and list(tmp_path.iterdir()) == []
    with pytest.raises(NotImplementedError):
        Memory().recall(torch.zeros(1), None)


@pytest.mark.parametrize('memory', [SnapshotMemory, store().__class__])
def test_calls_take_the_same_arguments(memory):
    for verb in VERBS:
        ours, base = (list(inspect.signature(getattr(each, verb)).parameters) for each in (memory, Memory))
        assert ours == base, verb
