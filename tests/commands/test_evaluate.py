"""`timm-aikd evaluate` against torchmetrics, scikit-learn and a run's own summary.csv."""
import csv
import re
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, top_k_accuracy_score
from timm.data import ImageNetInfo
from timm.models import resnet, save_for_hf
from torchmetrics.functional.classification import multiclass_calibration_error

from timm_aikd import AikdError
from timm_aikd.commands.predictions import Predictions, mean_outputs, outputs_of, scale_crosswise

from ..conftest import SMALL_RUN, run, training_scripts, write_images
from ..support.hub import HubServer
from .test_push import save_run


def answers(samples=500, classes=7, seed=0):
    """Logits that are right about half the time, and labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), target] += 2
    return logits * 2 * torch.rand(samples, 1, generator=generator), target  # too sure here, too unsure there


def batches(logits, target, size=64):
    return zip(logits.split(size), target.split(size), strict=True)


def predict(model, batches, columns=None):
    return Predictions.of(outputs_of(model, batches, columns))


@pytest.mark.parametrize('bins', [10, 15])
def test_metrics_are_those_of_torchmetrics_and_scikit_learn(bins):
    logits, target = answers()
    metrics = predict(nn.Identity(), batches(logits, target)).metrics(bins)
    probs, labels = logits.double().softmax(-1), range(7)
    assert metrics['top1'] == pytest.approx(100 * top_k_accuracy_score(target, probs, k=1, labels=labels), rel=1e-6)
    assert metrics['top5'] == pytest.approx(100 * top_k_accuracy_score(target, probs, k=5, labels=labels), rel=1e-6)
    assert metrics['nll'] == pytest.approx(log_loss(target, probs, labels=labels), rel=1e-6)
    ece = multiclass_calibration_error(probs, target, num_classes=7, n_bins=bins, norm='l1')
    assert metrics['ece'] == pytest.approx(100 * ece.item(), rel=1e-5)
    confidence, predicted = probs.max(-1)
    wrong = (predicted != target)[confidence.argsort(descending=True)].tolist()
    risks = [sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)]
    assert metrics['aurc'] == pytest.approx(1000 * sum(risks) / len(risks), rel=1e-6)


def test_the_number_of_bins_matters():
    predictions = predict(nn.Identity(), batches(*answers()))
    assert predictions.metrics(10)['ece'] != predictions.metrics(15)['ece']


def test_a_model_of_more_classes_answers_for_those_of_the_data():
    logits, target = answers()
    columns = torch.tensor([4, 0, 9, 2, 7, 1, 5])
    wide = torch.full((len(logits), 12), 50.)  # the other classes would win
    wide[:, columns] = logits
    narrow = predict(nn.Identity(), batches(logits, target))
    assert predict(nn.Identity(), batches(wide, target), columns).metrics() == narrow.metrics()


def test_the_model_is_put_in_eval_mode_and_fewer_than_five_classes_are_fine(tiny_net):
    model = tiny_net(num_classes=3).train()
    input, target = torch.randn(20, 4), torch.arange(20) % 3
    predictions = predict(model, [(input, target)])
    assert not model.training and predictions.metrics()['top5'] == 100
    torch.testing.assert_close(predictions.confidence, model(input).softmax(-1).max(-1).values.detach())


@pytest.mark.parametrize('given, fragment', [
    ([], 'has no images'),
    ([(torch.zeros(2, 3), torch.tensor([0, 3]))], 'the labels go from 0 to 3, the model has 3 classes'),
    ([(torch.zeros(2, 3), torch.tensor([-1, 0]))], 'the labels go from -1 to 0'),
])
def test_data_that_do_not_fit_are_refused(given, fragment):
    with pytest.raises(AikdError, match=fragment):
        predict(nn.Identity(), given)


def best_temperature(logits, target):
    """By scipy instead of by the package's bisection."""
    def nll(inverse):
        return torch.nn.functional.cross_entropy(logits.double() * inverse, target).item()
    return 1 / minimize_scalar(nll, bounds=(0.1, 10), method='bounded', options={'xatol': 1e-10}).x


@pytest.mark.parametrize('samples', [500, 501])
def test_no_image_has_a_temperature_that_was_fitted_on_it(samples):
    logits, target = answers(samples)
    scaled = scale_crosswise(logits, target)
    applied = (logits / scaled).double().mean(-1)
    first = applied.isclose(applied[0], rtol=1e-5)
    assert abs(int(first.sum()) - int((~first).sum())) == samples % 2
    assert 0 < first[:10].sum() < 10  # shuffled
    for half, other in ((first, ~first), (~first, first)):
        torch.testing.assert_close(
            applied[half], torch.full_like(applied[half], best_temperature(logits[other], target[other])),
            rtol=1e-4, atol=0)
    assert torch.equal(scaled, scale_crosswise(logits, target))


def test_one_image_has_no_other_half():
    with pytest.raises(AikdError, match='--calibrate: needs at least 2 images'):
        scale_crosswise(torch.zeros(1, 3), torch.tensor([0]))


# timm leaves closing image files to the garbage collector
unclosed = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def rows(output):
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in output.splitlines() if line.startswith('|')]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


@unclosed
def test_a_run_and_its_export_side_by_side_are_what_its_summary_says(image_folder, tmp_path, command):
    run(training_scripts()['examples'], *SMALL_RUN, '--data-dir', image_folder, '--output', tmp_path,
        '--experiment', 'x', '--mean', '0.2', '0.3', '0.4', '--aikd', '--aikd-teacher', 'none')
    run('-m', 'timm_aikd', 'push', tmp_path / 'x', '--to-folder', tmp_path / 'kept')
    code, printed = command(
        'evaluate', tmp_path / 'x', f'local-dir:{tmp_path / "kept"}', image_folder, '-j', 0,
        '--plot', tmp_path / 'r.png')
    assert code == 0
    with open(tmp_path / 'x' / 'summary.csv') as file:
        best = max(csv.DictReader(file), key=lambda row: float(row['eval_top1']))
    table = rows(printed)
    assert len(table) == 2
    for row in table.values():
        assert row['images'] == '36'
        assert float(row['top-1 %']) == pytest.approx(float(best['eval_top1']), abs=0.006)
        assert float(row['NLL']) == pytest.approx(float(best['eval_loss']), abs=1e-4)
        assert float(row['ECE % (15 bins)']) == pytest.approx(float(best['eval_ece']), abs=0.006)
        assert float(row['AURC x 1000']) == pytest.approx(float(best['eval_aurc']), abs=0.006)
    with Image.open(tmp_path / 'r.png') as picture:
        assert picture.format == 'PNG' and picture.width > picture.height > 400


@unclosed
def test_calibrate_adds_a_row_and_tells_the_temperature(image_folder, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('test_resnet', num_classes=3)
    with torch.no_grad():
        model.get_classifier().weight.mul_(100.)  # far too sure
    save_for_hf(model, 'kept', safe_serialization=True)
    code, plain = command('evaluate', 'local-dir:kept', image_folder, '-j', 0, '--plot', '')
    assert code == 0 and len(rows(plain)) == 1 and '--temperature' not in plain
    code, printed = command('evaluate', 'local-dir:kept', image_folder, '-j', 0, '--plot', 'r.png', '--calibrate')
    (name, before), (scaled_name, after) = rows(printed).items()
    temperature = float(re.fullmatch(r'local-dir:kept, T = ([\d.]+)', scaled_name)[1])
    assert code == 0 and before == rows(plain)[name] and temperature > 2 and '--temperature T' in printed
    assert after['top-1 %'] == before['top-1 %'] and after['images'] == '36'
    assert float(after['NLL']) < 0.9 * float(before['NLL'])


@unclosed
def test_models_joined_by_plus_are_one_row(image_folder, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        save_for_hf(timm.create_model('test_resnet', num_classes=3), name, safe_serialization=True)
    both = 'local-dir:a+local-dir:b'
    code, printed = command('evaluate', both, 'local-dir:a', 'local-dir:b', image_folder, '-j', 0, '--plot', '')
    assert code == 0 and list(rows(printed)) == [both, 'local-dir:a', 'local-dir:b']
    nets = [timm.create_model(f'local-dir:{name}', pretrained=True).eval() for name in 'ab']
    data = timm.data.create_loader(
        timm.data.create_dataset('', str(image_folder), split='validation'), nets[0].pretrained_cfg['input_size'], 64,
        use_prefetcher=False, num_workers=0, **{
            key: nets[0].pretrained_cfg[key] for key in ('mean', 'std', 'crop_pct', 'interpolation')})
    (images, target), = data
    with torch.no_grad():
        mean = sum(net(images).double().softmax(-1) for net in nets) / 2
    expected = -mean[torch.arange(len(target)), target].log().mean().item()
    assert float(rows(printed)[both]['NLL']) == pytest.approx(expected, abs=2e-4)
    with pytest.raises(AikdError, match='a.b: have 3 and 4 classes'):
        list(mean_outputs('a+b', [iter([(torch.zeros(2, classes), target)]) for classes in (3, 4)]))


@unclosed
def test_models_of_the_users_own_are_registered_by_import(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_models.py').write_text(OWN_MODEL)
    net = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 8, 8))
    net.pretrained_cfg = {'architecture': 'my_resnet'}
    save_run(tmp_path / 'run', net)
    arguments = ['-m', 'timm_aikd', 'evaluate', 'run', image_folder, '-j', '0', '--plot', '']
    refused = run(*arguments, check=False)
    assert refused.returncode == 1 and 'my_resnet' in refused.stderr and len(refused.stderr.splitlines()) == 1
    # as a console script, whose sys.path does not have the working directory
    assert '| run | 36 |' in run(*arguments, '--import', 'my_models', PYTHONSAFEPATH='1').stdout
    pushed = ['-m', 'timm_aikd', 'push', 'run', '--to-folder', 'kept', '--import', 'my_models']
    assert 'kept: README.md, config.json, model.safetensors' in run(*pushed).stdout
    assert '"architecture": "my_resnet"' in (tmp_path / 'kept' / 'config.json').read_text()


OWN_MODEL = '''
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

default_cfgs = generate_default_cfgs({'my_resnet': dict(
    input_size=(3, 64, 64), pool_size=(2, 2), first_conv='conv1', classifier='fc', num_classes=1000)})


@register_model
def my_resnet(pretrained=False, **kwargs):
    options = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    return build_model_with_cfg(ResNet, 'my_resnet', pretrained, **options, **kwargs)
'''


def test_more_than_one_process_is_refused(image_folder, tmp_path, monkeypatch, command):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, printed = command('evaluate', 'test_resnet', image_folder)
    assert code.startswith('error: evaluate: started as 2 processes (WORLD_SIZE), allowed is 1') and printed == ''
    assert 'torchrun' in code and '\n' not in code


@unclosed
@pytest.mark.parametrize('command_', ['evaluate', 'push'])
@pytest.mark.parametrize('base, known', [('org/base', True), ('org/base', False), ('timm/test_resnet.r160_in1k', True)])
def test_a_run_that_started_from_the_hub_needs_no_network(image_folder, tmp_path, monkeypatch, command_, base, known):
    monkeypatch.chdir(tmp_path)
    net = timm.create_model('test_resnet', num_classes=3)
    save_for_hf(timm.create_model('test_resnet', num_classes=7), 'base', safe_serialization=True)
    save_run(tmp_path / 'run', net, model=f'hf-hub:{base}', pretrained=True)
    words = {
        'evaluate': ['run', image_folder, '-j', '0', '--plot', ''], 'push': ['run', '--to-folder', 'kept']}[command_]
    with HubServer() as hub:
        hub.add('org/base', tmp_path / 'base')
        environment = hub.environment(tmp_path / 'home')
        if known and base == 'org/base':
            run('-c', 'import timm; timm.create_model("hf-hub:org/base", pretrained=True)', **environment)
            hub.requests.clear()
        done = run('-m', 'timm_aikd', command_, *words, check=False, **environment)
        assert hub.requests == []
        if not known:
            line, = done.stderr.splitlines()
            assert done.returncode == 1 and 'hf-hub:org/base' in line and '--model-name' in line
            words += ['--model-name', 'test_resnet']
            done = run('-m', 'timm_aikd', command_, *words, **environment)
        assert done.returncode == 0, done.stderr
        assert hub.requests == []
    assert ('| run | 36 |' if command_ == 'evaluate' else 'kept: README.md') in done.stdout


@unclosed
def test_an_imagenet_model_on_some_of_its_classes(tmp_path, command):
    names = ImageNetInfo().label_names()
    model = timm.create_model('test_resnet')
    with torch.no_grad():
        model.get_classifier().bias[7] += 100.  # what it always says, when asked for all
    save_for_hf(model, tmp_path / 'kept', safe_serialization=True)
    folder = write_images(tmp_path / 'data', classes=2, per_class=3, size=32)
    for label in (0, 1):
        (folder / 'validation' / f'class{label}').rename(folder / 'validation' / names[[300, 7][label]])
    code, printed = command(
        'evaluate', f'local-dir:{tmp_path / "kept"}', folder, '-j', 0, '--plot', '', '--bins', 10)
    row, = rows(printed).values()
    assert code == 0 and row['images'] == '6'
    first = sorted([names[300], names[7]]).index(names[7])  # folders are classes in alphabetical order
    assert float(row['top-1 %']) == 50. and 'ECE % (10 bins)' in row
    assert first in (0, 1) and 'no better than chance' in printed and not (tmp_path / 'reliability.png').exists()


@pytest.mark.parametrize('arguments, fragment', [
    (['no_such_model', 'DATA'], 'no_such_model: no such file, folder or timm model'),
    (['RUN', 'no/such/folder'], 'evaluate: DATA no/such/folder: no such folder: check the path'),
    (['RUN', 'DATA', '--dataset', 'torch/nonsense'], 'torch/nonsense in FOLDER cannot be opened (Unknown torchvision'),
    (['RUN', 'DATA', '--import', 'no_such_module'], '--import no_such_module: cannot be imported'),
    (['RUN', 'DATA', '--split', 'test'], '--split test: FOLDER has no such folder'),
    (['RUN', 'DATA', '--bins', '0'], '--bins 0: allowed is a whole number >= 1'),
    (['RUN', 'DATA', '-b', '0'], '--batch-size 0: allowed is a whole number >= 1'),
    (['RUN', 'DATA', '-j', '-1'], '--workers -1: allowed is a whole number >= 0'),
    (['RUN', 'DATA', '--device', 'abacus'], '--device abacus: is not available here'),
    (['RUN', 'DATA', '--plot', 'no/such/folder/x.png'], '--plot no/such/folder/x.png: cannot be written'),
    (['RUN', 'DATA', '--plot', 'x.jpeg'], '--plot x.jpeg: name a file that ends in .png'),
    (['RUN', 'OTHER'], 'has no folder validation, but others: name the split, such as --split test'),
    (['NARROW', 'DATA'], 'has 2 classes, the data set has 3'),
    (['RUN', 'NARROW', 'DATA'], 'has 2 classes, the data set has 3'),
    (['RUN', 'no_such_model', 'DATA'], 'no_such_model: no such file, folder or timm model'),
])
def test_what_cannot_be_evaluated_is_said_in_one_line(
        image_folder, tmp_path, monkeypatch, command, arguments, fragment):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictions, 'of', lambda _: pytest.fail('a model was run'))
    for name, classes in (('run', 3), ('narrow', 2)):
        save_for_hf(timm.create_model('test_resnet', num_classes=classes), name, safe_serialization=True)
    for split in ('train', 'test'):
        shutil.copytree(image_folder / 'train', f'other/{split}')
    places = {'OTHER': 'other', 'DATA': str(image_folder), 'RUN': 'local-dir:run', 'NARROW': 'local-dir:narrow'}
    code, printed = command('evaluate', '-j', 0, *(places.get(argument, argument) for argument in arguments))
    assert isinstance(code, str) and code.startswith('error: ') and all(
        word.replace('FOLDER', str(image_folder)) in code for word in fragment.split(' ... '))
    assert '\n' not in code and len(code) <= 300 and '--aikd' not in code and printed == ''
    assert not (tmp_path / 'reliability.png').exists()
