"""A network that only runs forward must answer as the one it was made of."""
import copy
import tempfile
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import StdConv2d
from timm.models import save_for_hf

from timm_aikd import Aikd, AikdConfig, SnapshotMemory, load_teacher
from timm_aikd import teacher as teacher_module
from timm_aikd.inference import fast_in_bfloat16, foldable, folded, forward_layout, load_folded_

from .distributed import spawn
from .test_teacher import source


class Net(nn.Module):
    """Convolutions and BatchNorms, called as `order` says."""
    pretrained_cfg = {'input_size': (3, 8, 8)}

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.n, self.m = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
        self.s, self.relu = StdConv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        return self.order(self, x)


@pytest.mark.parametrize('norm', [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_what_hooks_do_to_a_weight_is_not_folded(norm):
    net = Net(lambda net, x: net.n(net.a(x))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # of weight_norm
        norm(net.a)
    assert folded(net) == (net, [])


def double_use(net, x):
    y = net.a(x)
    return net.n(y) + y


@pytest.mark.parametrize('order, pairs', [
    (lambda net, x: net.n(net.a(x)), [('a', 'n')]),
    (lambda net, x: net.relu(net.n(net.b(net.relu(net.a(x))))), [('b', 'n')]),
    (lambda net, x: net.n(net.relu(net.a(x))), []),
    (lambda net, x: net.n(net.a(net.n(net.a(x)))), []),
    (lambda net, x: net.n(net.a(net.a(x))), []),
    (lambda net, x: net.m(net.a(x)), []),
    (lambda net, x: net.n(net.s(x)), []),
    (lambda net, x: net.n(x), []),
    (double_use, []),
    (lambda net, x: net.n(net.a(x)) if x.sum() > 0 else x, []),
])
def test_only_what_nothing_else_sees_is_folded(order, pairs):
    net = Net(order).eval()
    for norm in (net.n, net.m):
        nn.init.normal_(norm.weight)
    net.n.running_mean.normal_()
    net.n.running_var.uniform_(0.5, 2)
    assert foldable(net) == pairs
    before = copy.deepcopy(net)
    copied, found = folded(net)
    assert found == pairs and (copied is net) == (not pairs)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), before(x), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in net.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(torch.equal(*pair) for pair in zip(net.state_dict().values(), before.state_dict().values(), strict=True))


@pytest.mark.parametrize('name, count, options', [
    ('test_resnet', 15, {}), ('test_efficientnet', 13, {}), ('test_efficientnet', 13, {'bn_eps': 0.5}),
    ('test_resnet', 15, {'in_chans': 1}), ('test_vit', 0, {}), ('test_convnext', 0, {}),
    ('test_efficientnet_gn', 0, {}),
])
def test_models_of_timm_answer_as_before_and_follow_their_source(name, count, options):
    model = source(1, name, **options)
    copied, pairs = folded(model)
    assert len(pairs) == count
    kinds = [type(module).__name__ for module in copied.modules()]
    assert not count or not any(kind.startswith('BatchNorm') for kind in kinds)
    input = torch.randn(2, options.get('in_chans', 3), 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(copied(input), model(input), rtol=1e-4, atol=1e-5)
        other = source(2, name, **options)
        where = [tensor.data_ptr() for tensor in copied.state_dict().values()]
        copied = copied.to(memory_format=torch.channels_last) if not count else copied
        load_folded_(copied, pairs, other)
        assert not count or where == [tensor.data_ptr() for tensor in copied.state_dict().values()]
        torch.testing.assert_close(copied(input), other(input), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_checked_is_left_alone():
    model = source(1)
    assert folded(model.bfloat16())[1] == []
    model = source(1)
    del model.pretrained_cfg
    assert folded(model)[1] == []
    model = source(1)
    model.pretrained_cfg = {**model.pretrained_cfg, 'first_conv': None, 'input_size': (1, 32, 32)}
    assert folded(model) == (model, [])


def test_a_fold_that_answers_otherwise_is_undone(monkeypatch):
    model = source(1)
    monkeypatch.setattr('timm_aikd.inference.foldable', lambda _: [('layer1.0.conv1', 'layer1.0.bn2')])
    assert folded(model) == (model, [])


def test_a_snapshot_is_folded_and_overwritten_in_place():
    student, memory = source(1).train(), SnapshotMemory()
    memory.remember(student)
    where = [tensor.data_ptr() for tensor in memory.state_dict().values()]
    student.load_state_dict(source(2).state_dict())
    memory.remember(student)
    assert where == [tensor.data_ptr() for tensor in memory.state_dict().values()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in memory.modules())
    input = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(memory(input), source(2)(input), rtol=1e-4, atol=1e-5)
    assert student.training and any(isinstance(module, nn.BatchNorm2d) for module in student.modules())


def teacher_of(model, folder, **options):
    save_for_hf(model, folder, safe_serialization=True)
    return load_teacher(f'local-dir:{folder}', source(9, num_classes=model.num_classes), **options)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
def test_a_teacher_is_folded_and_answers_as_its_source(tmp_path, name):
    model = source(1, name)
    config = model.pretrained_cfg
    teacher = teacher_of(model, tmp_path, dtype='float32', mean=config['mean'], std=config['std'])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    convolutions = [module.weight for module in teacher.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    input = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(teacher(input), model(input), rtol=1e-4, atol=1e-5)


# the trial of bfloat16

@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr('timm_aikd.teacher.fast_in_bfloat16', lambda device: True)


@pytest.mark.parametrize('shift, taken', [(0., True), (5., False)])
def test_bfloat16_is_taken_where_the_answers_stay_the_same(tmp_path, fast, caplog, shift, taken):
    caplog.set_level('INFO', 'timm_aikd')
    model = source(1)
    with torch.no_grad():
        model.get_classifier().bias.copy_(torch.arange(5))  # rounding does not change the winner
    teacher = teacher_of(model, tmp_path)
    teacher.trial.get_classifier().bias[3] += shift  # one class wins more often
    reference = copy.deepcopy(teacher.model)
    generator = torch.Generator().manual_seed(0)
    for samples in (1000, 23, 1):
        assert teacher.dtype is None and teacher.trial is not None
        input = torch.randn(samples, 3, 32, 32, generator=generator)
        torch.testing.assert_close(teacher(input), reference(input).detach(), rtol=1e-5, atol=1e-5)
        teacher.settle()
    assert teacher.trial is None and teacher.dtype == (torch.bfloat16 if taken else None)
    assert next(teacher.model.parameters()).dtype == (torch.bfloat16 if taken else torch.float32)
    assert ('goes on in bfloat16' if taken else 'stays in float32') in caplog.text and 'of 1,024 samples' in caplog.text
    torch.testing.assert_close(teacher(input), reference(input).detach(), rtol=0, atol=0.1 if taken else 1e-5)


def test_under_autocast_there_is_nothing_to_try(tmp_path, fast):
    teacher = teacher_of(source(1), tmp_path)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        teacher(torch.randn(2, 3, 32, 32))
    assert teacher.trial is None and teacher.dtype is None
    teacher.settle()


@pytest.mark.parametrize('options, student_dtype', [
    ({'dtype': 'float32'}, torch.float32), ({'dtype': 'float16'}, torch.float32), ({}, torch.bfloat16)])
def test_a_precision_that_is_given_is_not_tried(tmp_path, fast, options, student_dtype):
    save_for_hf(source(1), tmp_path, safe_serialization=True)
    assert load_teacher(f'local-dir:{tmp_path}', source(9).to(student_dtype), **options).trial is None


@pytest.mark.parametrize('amp', [False, True])
def test_the_trial_is_of_training_steps_until_the_test_against_chance(tmp_path, fast, amp):
    input = torch.randn(1024, 3, 8, 8)
    target = teacher_of(source(1), tmp_path)(input).argmax(-1)
    teacher = teacher_of(source(1), tmp_path)
    aikd = Aikd(5, teacher, AikdConfig(teacher='given', adv_weight=0.))
    aikd.fit_teacher_temperature([(input, target)])  # outside autocast, whatever the training does
    assert teacher.trial is not None and teacher._tried == 0
    aikd.begin_epoch(0, nn.Identity())
    logits = torch.zeros(1024, 5, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
        aikd(input, logits, target, logits.sum())
    assert teacher.trial is None and teacher._tried == (0 if amp else 1024)


@pytest.mark.parametrize('precision', ['bfloat16', 'float32'])
def test_a_resumed_run_stays_with_the_precision_that_was_decided(tmp_path, fast, precision):
    first, second = (Aikd(5, teacher_of(source(1), tmp_path), AikdConfig(teacher='given')) for _ in range(2))
    first.teacher.decide(precision)
    second.load_state(first.get_state())
    assert second.teacher.trial is None and second.teacher.precision == precision
    assert second.teacher.dtype == (torch.bfloat16 if precision == 'bfloat16' else None)
    other = Aikd(5, teacher_of(source(1), tmp_path), AikdConfig(teacher='another'))
    other.load_state(first.get_state())
    assert other.teacher.trial is not None


def _rank_loads(rank, folder):
    teacher_module.fast_in_bfloat16 = lambda device: rank == 0
    return teacher_of(source(1), f'{folder}/{rank}').trial is None


def test_ranks_of_unlike_hosts_try_nothing(tmp_path):
    assert spawn(_rank_loads, 2, str(tmp_path)) == [True, True]


def _rank_settles(rank, _):
    with tempfile.TemporaryDirectory() as folder:
        teacher = teacher_of(source(1), folder)
        teacher.trial = copy.deepcopy(teacher.model).bfloat16()
        if rank == 1:
            teacher.trial.get_classifier().bias[3] += 5.  # it alone would not take it
        teacher(torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(rank)))
        teacher.settle()
        return teacher.trial is None, teacher.dtype


def test_ranks_decide_together():
    assert spawn(_rank_settles, 2) == 2 * [(True, None)]


def test_what_is_fast_is_asked_of_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert not fast_in_bfloat16(torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert fast_in_bfloat16(torch.device('cuda'))
    assert not fast_in_bfloat16(torch.device('meta'))
    for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not fast_in_bfloat16(torch.device('cpu'))
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')  # as in older versions
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    assert fast_in_bfloat16(torch.device('cpu'))


@pytest.mark.parametrize('device, layout, expected', [
    ('cpu', torch.contiguous_format, torch.channels_last), ('cpu', torch.channels_last, torch.channels_last),
    ('meta', torch.contiguous_format, torch.preserve_format), ('meta', torch.channels_last, torch.channels_last),
])
def test_the_layout_is_what_is_fast_or_what_the_student_has(device, layout, expected):
    student = timm.create_model('test_resnet').to(device).to(memory_format=layout)
    assert forward_layout(student) == expected
