"""A script without tasks under AI-KD."""
import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from timm_aikd import AikdError, Teacher
from timm_aikd.script import hooks

from .stand_in import WITHOUT_TASKS, ImageNet3, Script, args, image_loader
from .test_options import TEACHER


@pytest.mark.parametrize('wrap', [lambda model: model, lambda model: torch.compile(model, backend='eager')])
def test_a_script_without_tasks(tmp_path, caplog, monkeypatch, wrap):
    """The method, its metrics and its state go through loss_fn and the saver; nothing is left on model or torch."""
    caplog.set_level(logging.INFO)
    teacher = ImageNet3()
    monkeypatch.setattr(hooks, 'load_teacher', lambda specs, **_: Teacher(teacher, name=specs[0]))
    torch_save = torch.save
    states = []
    for resume in ('', str(tmp_path / 'last.pth.tar')):
        with Script(**WITHOUT_TASKS) as script:
            parsed = script.parse(*TEACHER, '--aikd-memory-dir', str(tmp_path), '--aikd-disc-hidden', '8')
            parsed.resume = resume
            loader, model = image_loader(script), wrap(ImageNet3())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            saver = CheckpointSaver(
                model, optimizer, args=parsed, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
            criterion = nn.CrossEntropyLoss()
            before = [p.clone() for p in model.parameters()]
            for epoch in (2,) if resume else (0, 1):
                metrics = script.globals['train_one_epoch'](
                    epoch, model, loader, optimizer, criterion, parsed, saver=saver, output_dir=str(tmp_path))
                saver.save_checkpoint(epoch, metric=float(epoch))
            saver.save_recovery(epoch)
            assert not model._forward_pre_hooks and torch.save is torch_save
            assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        saved = torch.load(tmp_path / 'last.pth.tar', weights_only=False)
        recovery, = (torch.load(path, weights_only=False) for path in tmp_path.glob(f'recovery-{epoch}-*'))
        assert recovery['task_state']['aikd']['epoch'] == epoch
        assert metrics['aikd_progressive'] > 0 and metrics['aikd_kd'] > 0
        states.append(saved['task_state']['aikd'])
    steps = [state['discriminator']['optimizer']['state'][0]['step'].item() for state in states]
    assert steps == [12, 18] and 'prediction memory of epoch 1 restored, 24 samples' in caplog.text
    assert saved['state_dict'].keys() == ImageNet3().state_dict().keys()


def test_a_script_without_tasks_has_the_loss_of_each_batch(monkeypatch):
    """kd alone, a teacher that looks at the images: the loss handed to the script is that of the batch at hand."""
    losses = []

    def train(epoch, model, loader, optimizer, loss_fn, args, saver=None):
        for input, target in loader:
            output = model(input)
            loss = loss_fn(output, target)
            soft = (teacher(input) / 2).softmax(-1)
            kd = nn.functional.kl_div((output / 2).log_softmax(-1), soft, reduction='batchmean')
            losses.append((loss.item(), (nn.functional.cross_entropy(output, target) + 4 * kd).item()))
        return OrderedDict(loss=1.)

    with Script(**{**WITHOUT_TASKS, 'train_one_epoch': train}) as script:
        teacher = ImageNet3()
        monkeypatch.setattr(hooks, 'load_teacher', lambda specs, **_: Teacher(teacher, name=specs[0]))
        parsed = script.parse(
            *TEACHER, '--aikd-alpha', '0', '--aikd-adv-weight', '0', '--aikd-teacher-temperature', '1')
        script.globals['train_one_epoch'](0, ImageNet3(), image_loader(script), None, nn.CrossEntropyLoss(), parsed)
    assert len(losses) == 6 and len({loss for loss, _ in losses}) == 6
    assert all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses)


def test_a_misfit_is_found_before_training_in_a_script_without_tasks(tmp_path):
    with Script(**WITHOUT_TASKS, create_optimizer_v2=create_optimizer_v2) as script:
        torch.save(ImageNet3().state_dict(), tmp_path / 'teacher.pth')
        script.parse('--aikd', '--aikd-teacher', str(tmp_path / 'teacher.pth'))
        script.globals['create_optimizer_v2'](ImageNet3(), opt='sgd', lr=0.1)
        with pytest.raises(AikdError, match=r'of a test_resnet \(92 keys missing'):
            image_loader(script)


def test_a_plain_checkpoint_resumes_without_tasks(tmp_path, caplog):
    torch.save({'state_dict': {}, 'epoch': 1}, tmp_path / 'plain.pth.tar')
    for name, message in (('plain', 'of a run without AI-KD'), ('broken', 'never unpickled')):
        with Script(**WITHOUT_TASKS) as script:
            parsed = args(script)
            parsed.resume = str(tmp_path / f'{name}.pth.tar')
            (tmp_path / 'broken.pth.tar').write_bytes(b'cos\nsystem\n(S"echo"\ntR.')
            words = (0, ImageNet3(), image_loader(script), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.),
                     nn.CrossEntropyLoss(), parsed)
            if name == 'broken':
                with pytest.raises(AikdError, match=message):
                    script.globals['train_one_epoch'](*words)
            else:
                script.globals['train_one_epoch'](*words)
                assert message in caplog.text
