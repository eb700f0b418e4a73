"""A folded network must answer as the one it was made of."""
import copy
import warnings

import pytest
import torch
import torch.nn as nn
from timm.layers import StdConv2d

from timm_aikd.folding import foldable, folded, load_folded_

from .support.teachers import source


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
    monkeypatch.setattr('timm_aikd.folding.foldable', lambda _: [('layer1.0.conv1', 'layer1.0.bn2')])
    assert folded(model) == (model, [])
