"""Terms on features: where the features come from, and what D and the student learn from them."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_aikd import AikdConfig, AikdError, AikdTask
from timm_aikd.features import FeatureTap
from timm_aikd.inference import folded
from timm_aikd.teacher import Teacher, TeacherEnsemble

from .support import oracle

ONE_PHASE = dict(teacher='given', kd_weight=0, alpha=0, disc_input='features', adv_weight=0.3, disc_hidden=(8,))


def model(name='test_resnet', seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': 4, **kwargs})


def images(size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 4, (size,), generator=generator)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_byobnet'])
def test_features_are_those_before_the_classifier(name):
    net = model(name, **({'img_size': 32} if name == 'test_vit' else {})).eval()
    tap = FeatureTap(net, 'the student')
    x, _ = images()
    output = net(x)
    features = tap.take()
    torch.testing.assert_close(features, net.forward_head(net.forward_features(x), pre_logits=True))
    assert features.shape == (6, tap.width) and net.get_classifier()(features).equal(output)


def test_the_first_of_two_heads():
    net = model('deit_tiny_distilled_patch16_224', img_size=32, depth=1)
    tap = FeatureTap(net, 'the student')
    net(images()[0])
    assert tap.width == net.head.in_features and tap.take().shape == (6, tap.width)


def test_copies_are_not_tapped_and_the_model_can_be_saved():
    net = model()
    tap = FeatureTap(net, 'the student')
    x, _ = images()
    net(x)
    other = copy.deepcopy(net)  # as a moving average or a snapshot does, with features of a graph at hand
    features = tap.take()
    other(x)
    with pytest.raises(AikdError, match='has not run forward'):
        tap.take()
    assert features.requires_grad
    pickle.loads(pickle.dumps(net))(x)


@pytest.mark.parametrize('net, message', [
    (lambda: model(num_classes=0), 'has no classifier'), (lambda: nn.Linear(3, 2), 'has no classifier')])
def test_models_without_a_classifier_are_refused(net, message):
    with pytest.raises(AikdError, match=message):
        FeatureTap(net(), 'the student')


def test_features_of_each_token_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(x).mean(1)

    tap = FeatureTap(net := Tokens(), 'the student')
    net(torch.zeros(2, 5, 8))
    with pytest.raises(AikdError, match=r'\[2, 5, 8\], not one vector of 8'):
        tap.take()


def test_one_phase_learns_from_features_alone(caplog):
    """The teacher has other classes; loss, D's step and gradients are those of the equations."""
    student, teacher = model(seed=1), model(seed=2, num_classes=9).eval()
    mirror = copy.deepcopy(student)
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=AikdConfig(**ONE_PHASE), epochs=2)
    mlp = copy.deepcopy(task.aikd.discriminator.mlp)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3, weight_decay=0.)
    assert not task.aikd.needs_temperature
    caplog.set_level('INFO')
    task.begin_epoch(0)
    assert 'its features alone: classes, T_c and top-1 are neither used nor checked' in caplog.text
    for _ in range(3):
        x, y = images()
        result = task(x, y)
        features = mirror.forward_head(mirror.forward_features(x), pre_logits=True)
        output = mirror.get_classifier()(features)
        with torch.no_grad():
            real = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
        real, fake = (F.layer_norm(each, each.shape[-1:]) for each in (real, features))
        disc = -torch.log(torch.sigmoid(mlp(real))).mean() - torch.log(1 - torch.sigmoid(mlp(fake.detach()))).mean()
        optimizer.zero_grad()
        disc.backward()
        optimizer.step()
        adv = -torch.log(torch.sigmoid(mlp(fake))).mean()
        expected = F.cross_entropy(output, y) + 0.3 * adv
        torch.testing.assert_close(result['loss'], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result['disc_loss'], disc.detach(), rtol=1e-4, atol=1e-5)
        assert result['kd_loss'] == result['progressive_loss'] == 0
        for loss, net in ((result['loss'], student), (expected, mirror)):
            net.zero_grad()
            loss.backward()
        for ours, theirs in zip(student.parameters(), mirror.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                for parameter in (ours, theirs):
                    parameter -= 0.05 * parameter.grad
    metrics = task.end_epoch()
    assert metrics['teacher_top1'] == 0 and 0 <= metrics['disc_accuracy'] <= 1
    with pytest.raises(AikdError, match='no T_c to fit'):
        task.calibrate([])


@pytest.mark.parametrize('memory', ['snapshot', 'store'])
def test_features_beside_all_other_terms(memory):
    """The snapshot's forward comes between the student's and D's step, and must not be taken for the student's."""
    config = AikdConfig(teacher='given', disc_input='features', memory=memory, teacher_temperature=1., adv_weight=1.)
    student, teacher = model(seed=1), model(seed=2)
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)  # else the student would stay as the memory has it
    data = torch.utils.data.TensorDataset(*images(12))
    for epoch in range(2):
        loader = torch.utils.data.DataLoader(data, 6)
        task.begin_epoch(epoch, loader)
        for x, y in loader:
            result = task(x, y)
            optimizer.zero_grad()
            result['loss'].backward()
            assert student.get_classifier().weight.grad.isfinite().all()
            optimizer.step()
    assert result['progressive_loss'] > 0 and result['kd_loss'] > 0 and result['adv_loss'] > 0


@pytest.mark.parametrize('compiled', [False, True])
def test_compiled_networks_give_the_same_losses(compiled):
    """Student, teacher and snapshot are of one architecture: none of them may run the graph of another."""
    losses = []
    config = AikdConfig(**{**ONE_PHASE, 'alpha': 0.5, 'memory': 'snapshot'})
    for backend in (None, 'aot_eager' if compiled else 'eager'):
        student, teacher = model(seed=1), folded(model(seed=2).eval())[0]  # as `load_teacher` gives it
        task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=2)
        if backend:
            torch._dynamo.reset()
            task.compile(backend=backend)
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
        for epoch in range(2):
            task.begin_epoch(epoch)
            for _ in range(2):
                loss = task(*images())['loss']
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            task.get_eval_model().eval()(images()[0])  # validation
            task.train()
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)


@pytest.mark.parametrize('adv_weight', [0, 0.3])
def test_the_feature_term_is_the_distance_of_normalised_features(adv_weight):
    """The teacher has other classes; loss and gradients are those of the equations."""
    student, teacher = model(seed=1), model(seed=2, num_classes=9).eval()
    mirror, (x, y) = copy.deepcopy(student), images()
    config = AikdConfig(**{**ONE_PHASE, 'adv_weight': adv_weight, 'feature_weight': 0.7})
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=2)
    task.begin_epoch(0)
    result = task(x, y)
    features = mirror.forward_head(mirror.forward_features(x), pre_logits=True)
    with torch.no_grad():
        wanted = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
    distance = oracle.feature_distance(features, wanted).mean()
    torch.testing.assert_close(result['features_loss'].double(), distance.detach())
    expected = F.cross_entropy(mirror.get_classifier()(features), y) + 0.7 * distance
    if adv_weight:
        expected += 0.3 * oracle.adv_loss(task.aikd.discriminator(oracle.layer_norm(features).float())).mean()
    torch.testing.assert_close(result['loss'].double(), expected.double())
    ours, theirs = (torch.autograd.grad(loss, net.conv1.parameters())
                    for loss, net in ((result['loss'], student), (expected, mirror)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert task.end_epoch()['features'] == pytest.approx(distance.item(), rel=1e-5)


def test_of_several_teachers_only_the_first_runs_for_its_features():
    """They need not have the same classes then."""
    student, (first, second) = model(), (Teacher(model(seed=seed, num_classes=4 + seed)) for seed in (1, 2))
    config = AikdConfig(teacher=('a', 'b'), kd_weight=0, alpha=0, adv_weight=0, feature_weight=1)
    second.register_forward_pre_hook(lambda *_: pytest.fail('the second teacher ran'))
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=TeacherEnsemble([first, second]), config=config, epochs=2)
    task.begin_epoch(0)
    assert task(*images())['features_loss'] > 0


def test_a_sample_without_finite_features_has_no_feature_term(caplog):
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(96, 4)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            self.seen = x.flatten(1)[:, :96].clone()
            self.seen[2] = torch.inf
            return self.fc(self.seen)

    config = AikdConfig(teacher='given', kd_weight=0, alpha=0, adv_weight=0, feature_weight=1)
    student, teacher, (x, y) = model().eval(), Teacher(), images()
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=2)
    task.begin_epoch(0)
    result = task(x, y)
    features = student.forward_head(student.forward_features(x), pre_logits=True)
    kept = [0, 1, 3, 4, 5]
    distance = oracle.feature_distance(features[kept], teacher.seen[kept]).sum() / 6
    torch.testing.assert_close(result['features_loss'].double(), distance.detach())
    result['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    task.end_epoch()
    assert 'no finite answer for 1 of 6 samples' in caplog.text


def test_another_number_of_features_is_refused_with_both():
    with pytest.raises(AikdError, match=r'has 256 features .* student 96'):
        AikdTask(model(), nn.CrossEntropyLoss(), teacher=model('test_efficientnet'), config=AikdConfig(**ONE_PHASE))
