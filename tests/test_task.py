"""AikdTask beside timm's own tasks, in checkpoints, and on two ranks."""
import argparse
import copy
import logging
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_aikd import AikdConfig, AikdError, AikdTask
from timm_aikd.terms import Distillation

from .support.distributed import spawn


def small_model(seed=0, num_classes=4):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=num_classes)


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def given(**options):
    return AikdConfig(teacher='given', teacher_temperature=1., **options)


def train(task, optimizer, steps=3, first=0):
    losses = []
    for step in range(first, first + steps):
        result = task(*batch(step))
        losses.append(result['loss'].item())
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same_weights(a, b, **tolerance):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f'{name}: {text}', **tolerance)
        else:
            assert torch.equal(x, y), name


def test_with_all_terms_off_it_is_bitwise_the_classification_task():
    models = small_model(), small_model()
    tasks = (
        ClassificationTask(models[0], nn.CrossEntropyLoss(), verbose=False),
        AikdTask(models[1], nn.CrossEntropyLoss(), config=AikdConfig(teacher='none', alpha=0), epochs=3, verbose=False),
    )
    tasks[1].begin_epoch(1)
    losses = [train(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)) for task in tasks]
    assert losses[0] == losses[1]
    assert_same_weights(*models)


def test_with_the_kd_term_alone_it_is_timms_logit_distillation():
    models, teacher = (small_model(), small_model()), small_model(1).eval()
    theirs = LogitDistillationTask(
        models[0], copy.deepcopy(teacher), nn.CrossEntropyLoss(), distill_loss_weight=0.7, task_loss_weight=1.,
        temperature=3., verbose=False)
    config = given(alpha=0, adv_weight=0, kd_weight=0.7, temperature=3.)
    ours = AikdTask(models[1], nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=3, verbose=False)
    ours.begin_epoch(1)
    losses = [train(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)) for task in (theirs, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_weights(*models, rtol=1e-5, atol=1e-6)


def test_result_has_the_same_keys_whatever_is_on():
    keys = {'loss', 'output', 'task_loss', 'progressive_loss', 'kd_loss', 'features_loss', 'adv_loss', 'disc_loss'}
    for config in (given(), AikdConfig(teacher='none'), AikdConfig(teacher='none', alpha=0)):
        task = AikdTask(small_model(), nn.CrossEntropyLoss(), teacher=small_model(1), config=config, verbose=False)
        for epoch in range(2):
            task.begin_epoch(epoch)
            result = task(*batch())
            assert set(result) == keys and result['output'].shape == (6, 4)
            assert not any(value.requires_grad for name, value in result.items() if name not in ('loss', 'output'))


@pytest.mark.parametrize('criterion, binary, sum_classes', [
    (nn.CrossEntropyLoss(), False, False),
    (BinaryCrossEntropy(), True, False),
    (BinaryCrossEntropy(sum_classes=True), True, True),
    (nn.BCEWithLogitsLoss(), True, False),
])
def test_knows_a_bce_criterion(criterion, binary, sum_classes):
    task = AikdTask(small_model(), criterion, teacher=small_model(1), config=given(), verbose=False)
    kd, = (term for term in task.aikd.terms if isinstance(term, Distillation))
    assert task.run.binary == binary and isinstance(kd.soft_loss, partial) == binary
    assert not binary or kd.soft_loss.keywords == {'sum_classes': sum_classes}
    assert task.aikd.discriminator.binary == binary


def test_the_student_stays_pure():
    model = small_model()
    names, parameters = set(model.state_dict()), list(map(id, model.parameters()))
    task = AikdTask(model, nn.CrossEntropyLoss(), teacher=small_model(1), config=given(), verbose=False)
    task.setup_ema(decay=0.9)
    for epoch in range(2):
        task.begin_epoch(epoch)
        task(*batch())
    assert list(map(id, task.get_trainable_module().parameters())) == parameters
    assert list(map(id, task.get_clip_parameters())) == parameters
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'} and set(state['state_dict']) == names
    assert set(task.get_checkpoint_state(ema=True)) == {'state_dict_ema'}


def test_a_model_without_num_classes_is_refused():
    with pytest.raises(AikdError, match='num_classes'):
        AikdTask(nn.Linear(3, 2), nn.CrossEntropyLoss(), config=AikdConfig(teacher='none'), verbose=False)


def checkpointed(folder, aikd=True, ema=False):
    """One epoch of training, then a checkpoint as timm's scripts write it."""
    model = small_model()
    task = AikdTask(
        model, nn.CrossEntropyLoss(), teacher=small_model(1), config=given(), epochs=3, verbose=False,
    ) if aikd else ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if ema:
        task.setup_ema(decay=0.5)
    if aikd:
        task.begin_epoch(0)
    train(task, optimizer)
    task.update_ema(1)
    saver = CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model='test_resnet'), checkpoint_dir=str(folder),
        recovery_dir=str(folder), task=task)
    saver.save_checkpoint(0, metric=1.)
    return task, optimizer


@pytest.mark.parametrize('ema', [False, True])
def test_resume_restores_d_and_its_optimizer_exactly(tmp_path, ema):
    task, optimizer = checkpointed(tmp_path, ema=ema)
    resumed = AikdTask(
        small_model(5), nn.CrossEntropyLoss(), teacher=small_model(1), config=given(), epochs=3, verbose=False)
    other = torch.optim.SGD(resumed.trainable_module.parameters(), lr=0.05)
    assert resume_task_checkpoint(resumed, str(tmp_path / 'last.pth.tar'), other) == 1
    if ema:
        resumed.setup_ema(decay=0.5)
        load_task_ema_checkpoint(resumed, str(tmp_path / 'last.pth.tar'))
    losses = []
    for each, each_optimizer in ((task, optimizer), (resumed, other)):
        each.begin_epoch(1)  # the snapshot is the student at the end of epoch 0 on both sides
        losses.append(train(each, each_optimizer, first=10))
    assert losses[0] == losses[1]
    assert_same_weights(task.trainable_module, resumed.trainable_module)
    assert_same_weights(task.aikd.discriminator, resumed.aikd.discriminator)


def test_a_plain_checkpoint_resumes_and_says_what_starts_fresh(tmp_path, caplog):
    checkpointed(tmp_path, aikd=False)
    task = AikdTask(small_model(5), nn.CrossEntropyLoss(), teacher=small_model(1), config=given(), verbose=False)
    with caplog.at_level(logging.WARNING):
        assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar')) == 1
    assert any('without AI-KD' in message and 'start fresh' in message for message in caplog.messages)


def test_the_checkpoint_loads_anywhere_timms_do(tmp_path):
    task, _ = checkpointed(tmp_path)
    model = timm.create_model('test_resnet', num_classes=4, checkpoint_path=tmp_path / 'last.pth.tar')
    assert_same_weights(model, task.trainable_module)
    plain = ClassificationTask(small_model(7), nn.CrossEntropyLoss(), verbose=False)
    resume_task_checkpoint(plain, str(tmp_path / 'last.pth.tar'))
    assert_same_weights(plain.trainable_module, task.trainable_module)


def test_log_says_what_is_on_and_every_epoch(caplog):
    caplog.set_level(logging.INFO)
    config = AikdConfig(teacher='given')
    task = AikdTask(small_model(), nn.CrossEntropyLoss(), teacher=small_model(1), config=config, epochs=2)
    task.begin_epoch(0)
    task(*batch())
    task.end_epoch()
    ours = [message for message in caplog.messages if message.startswith('AI-KD')]
    assert 'memory snapshot' in ours[0] and 'no data loader' in ours[0]
    assert 'no validation images to fit T_c on: T_c = 1' in ours[1]
    assert 'progressive' in ours[2] and 'kd (1, tau 2)' in ours[2] and 'adversarial (0.1, bce on log-probs)' in ours[2]
    assert ours[3].startswith('AI-KD: epoch 0: task ') and 'teacher_top1' in ours[3]
    caplog.clear()
    AikdTask(small_model(), nn.CrossEntropyLoss(), config=AikdConfig(teacher='none')).begin_epoch(0)
    assert 'a run of one epoch' in caplog.messages[-2]
    AikdTask(small_model(), nn.CrossEntropyLoss(), config=AikdConfig(teacher='none', alpha=0)).begin_epoch(0)
    assert 'terms: none, this is plain training' in caplog.messages[-1]
    assert f'on timm {timm.__version__}' in caplog.messages[-1]


class Images(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3, 64, 64), index / self.size), index % 4


def test_a_loader_for_each_epoch_and_one_of_other_data():
    config = AikdConfig(teacher='none', alpha=0.5)
    task = AikdTask(small_model(), nn.CrossEntropyLoss(), config=config, epochs=3, verbose=False)
    for epoch in range(2):
        loader = torch.utils.data.DataLoader(Images(10), 3, shuffle=True)  # the last batch has one sample
        task.begin_epoch(epoch, loader)
        results = [task(*images)['progressive_loss'].item() for images in loader]
        task.end_epoch()
    assert task.aikd.memory.name == 'store' and all(result > 0 for result in results) and len(results) == 4
    with pytest.raises(AikdError, match='8 samples.*10'):
        task.begin_epoch(2, torch.utils.data.DataLoader(Images(8), 3))


def test_compiled_networks_give_the_eager_loss():
    losses = []
    for compiled in (False, True):
        task = AikdTask(
            small_model(), nn.CrossEntropyLoss(), teacher=small_model(1), config=given(), epochs=3, verbose=False)
        if compiled:
            task.compile(backend='eager')
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
        for epoch in range(3):
            task.begin_epoch(epoch)
            losses += train(task, optimizer, steps=2)
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-4)


def _rank_trains(rank, _):
    logging.disable()
    torch.manual_seed(rank)  # ranks differ in their seeds, as under timm's scripts
    config = given(disc_hidden=(8,))
    task = AikdTask(
        small_model(), nn.CrossEntropyLoss(), teacher=small_model(1), config=config, epochs=3, verbose=False)
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    metrics = []
    for epoch in range(2):
        task.begin_epoch(epoch)
        task.train()
        train(task, optimizer, steps=2, first=10 * rank)
        metrics.append(task.end_epoch())
    return torch.cat([p.detach().flatten() for p in task.aikd.discriminator.parameters()]), metrics, \
        torch.cat([p.detach().flatten() for p in task.get_trainable_module().parameters()])


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_two_ranks_agree_on_everything():
    first, second = spawn(_rank_trains, 2)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert first[1] == second[1] and first[1][1]['progressive'] > 0
