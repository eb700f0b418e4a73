"""The snapshot is the student as it was at the end of the previous epoch."""
import torch

from timm_aikd import SnapshotMemory


def test_is_the_student_of_the_previous_epoch_in_eval_mode(tiny_net):
    torch.manual_seed(0)
    student, memory = tiny_net(), SnapshotMemory()
    x = torch.randn(6, 4)
    for _ in range(3):
        student.train()
        student(x).sum().backward()  # moves BatchNorm's statistics
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
        student.eval()
        expected = student(x).detach()
        student.train()
        memory.remember(student)
        student(x)
        with torch.no_grad():
            student.head.bias += 1
        assert torch.equal(memory(x), expected)


def test_is_overwritten_in_place_and_trains_nothing(tiny_net):
    student, memory = tiny_net(), SnapshotMemory()
    memory.remember(student)
    addresses = [tensor.data_ptr() for tensor in memory.state_dict().values()]
    model = memory.model
    with torch.no_grad():
        student.head.weight.zero_()
    memory.remember(student.train())
    memory.train()
    assert memory.model is model and not model.training
    assert [tensor.data_ptr() for tensor in memory.state_dict().values()] == addresses
    assert torch.equal(model.head.weight, student.head.weight)
    assert model.head.weight.data_ptr() != student.head.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in memory.parameters())
    assert not memory(torch.randn(2, 4)).requires_grad
    assert student.training and student.head.weight.requires_grad


def test_copying_moves_no_random_stream(tiny_net):
    student, state = tiny_net(), torch.get_rng_state()
    SnapshotMemory().remember(student)
    assert torch.equal(torch.get_rng_state(), state)
