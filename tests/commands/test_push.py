"""A finished run on the Hub: the model that comes back, what its card says, and what is refused."""
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import load_state_dict, save_for_hf

from timm_aikd.commands import push as publish
from timm_aikd.commands.finished_run import FinishedRun
from timm_aikd.commands.model_card import CITATION, model_card
from timm_aikd.commands.push import write_model_folder

from ..conftest import ROOT, SMALL_RUN, run, training_scripts
from ..support.hub import HubServer
from ..support.teachers import arguments, source


def save_run(folder, net, state=None, summary=None, names=None, **args):
    """What timm's scripts leave behind: a checkpoint, and summary.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {'model': net.pretrained_cfg['architecture'], 'data_dir': '/home/somebody/secret/flowers', **args}
    checkpoint = {'state_dict': net.state_dict(), 'epoch': 3, 'args': arguments(**args)}
    if state is not None:
        checkpoint['task_state'] = {'aikd': state}
    torch.save(checkpoint, folder / 'model_best.pth.tar')
    if summary is not None:
        (folder / 'summary.csv').write_text(summary)
    return folder


def logits(model, input):
    with torch.no_grad():
        return model.eval()(input)


@pytest.mark.parametrize('name, options, args', [
    ('test_resnet', {}, {}),
    ('test_resnet', {}, {
        'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6], 'crop_pct': 0.7, 'interpolation': 'bilinear'}),
    ('test_resnet', {'in_chans': 1}, {'in_chans': 1, 'mean': [0.2], 'std': [0.3]}),
    ('test_resnet', {'global_pool': 'max'}, {'gp': 'max'}),
    ('test_resnet', {'stem_width': 8}, {'model_kwargs': {'stem_width': 8}}),
    ('test_efficientnet', {'bn_eps': 0.1}, {'bn_eps': 0.1}),
    ('test_vit', {'img_size': 32}, {'img_size': 32}),
    ('test_vit', {'img_size': 48}, {'input_size': [3, 48, 48]}),
])
def test_the_model_comes_back_bit_for_bit(tmp_path, command, name, options, args):
    model = source(1, name, **options)
    code, out = command(
        'push', save_run(tmp_path / 'run', model, **args), '--to-folder', tmp_path / 'kept')
    assert code == 0, code
    assert set(os.listdir(tmp_path / 'kept')) == {'README.md', 'config.json', 'model.safetensors'}
    again = timm.create_model(f'local-dir:{tmp_path / "kept"}', pretrained=True)
    config = timm.data.resolve_model_data_config(again)
    for key in ('mean', 'std', 'crop_pct', 'interpolation'):
        if key in args:
            assert config[key] == args[key] or list(config[key]) == args[key]
    size = options.get('img_size', 64)
    input = torch.randn(3, options.get('in_chans', 3), size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(again, input), logits(model, input))
    assert again.num_classes == 5


@pytest.mark.parametrize('args, kept', [
    ({}, 'state_dict'),
    ({'model_ema': True}, 'state_dict_ema'),
    ({'model_ema': True, 'model_ema_force_cpu': True}, 'state_dict'),
])
def test_the_weights_are_those_that_were_validated(tmp_path, args, kept):
    save_run(tmp_path, source(1), **args)
    checkpoint = torch.load(tmp_path / 'model_best.pth.tar', weights_only=False)
    if 'model_ema' in args:
        checkpoint['state_dict_ema'] = source(2).state_dict()
        torch.save(checkpoint, tmp_path / 'model_best.pth.tar')
    run_ = FinishedRun.read(tmp_path)
    for key, tensor in run_.model.state_dict().items():
        assert torch.equal(tensor, checkpoint[kept][key])
    assert run_.uses_average == (kept == 'state_dict_ema')


def test_what_is_said_of_other_weights_is_left_out(tmp_path):
    model = source(1, 'test_resnet', num_classes=1000)
    run_ = FinishedRun.read(save_run(tmp_path / 'run', model))
    run_.model.pretrained_cfg.update(
        test_input_size=(3, 96, 96), paper_ids='arXiv:0000.00000', license='mit', tag='x_in1k')
    (tmp_path / 'kept').mkdir()
    write_model_folder(run_, tmp_path / 'kept', None)
    text = (tmp_path / 'kept' / 'config.json').read_text()
    assert not any(word in text for word in ('paper_ids', 'test_input_size', 'in1k', 'license', 'hf_hub_id'))


SUMMARY = '\n'.join([
    'epoch,train_loss,train_aikd_task,eval_loss,eval_top1,eval_top5,eval_ece,eval_aurc',
    '2,1.5,1.0,0.5,80.0,99.0,3.0,50.0', '3,1.4,0.9,0.4321,81.25,99.5,2.345,45.6', ''])


def state(**config):
    options = {'teacher': 'hf-hub:org/net@' + 40 * 'a', 'teacher_temperature': 'auto', 'kd_weight': 1., 'alpha': 0.3,
               'disc_hidden': [256, 256], 'memory_dir': '/home/somebody/tmp', **config}
    return {
        'version': 1, 'config': options, 'epoch': 3, 'teacher_temperature': 1.875, 'class_names': list('abcde'),
        'teacher_metrics': {'top1': 78.5, 'nll': 0.6, 'ece': 1.25, 'aurc': 60.5, 'samples': 2048},
    }


def card_of(folder, **options):
    return model_card(FinishedRun.read(folder), 'me/net', **options)


def test_the_card_tells_a_visitor_what_counts(tmp_path):
    save_run(tmp_path, source(1), state(), SUMMARY, dataset='hfds/org/flowers', val_split='test', opt='lamb', lr=5e-3,
             model_ema=True, model_ema_decay=0.99, seed=0)
    text = card_of(tmp_path, license='apache-2.0')
    card = ModelCard(text)
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert card.data.base_model == ['org/net'] and card.data.license == 'apache-2.0'
    assert card.data.datasets == ['org/flowers'] and 'timm-aikd' in card.data.tags
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {'accuracy': 81.25, 'top-5-accuracy': 99.5, 'nll': 0.4321, 'ece': 2.345, 'aurc': 45.6}
    assert {result.dataset_split for result in card.data.eval_results} == {'test'}
    for line in (
            '|  | top-1 % | top-5 % | NLL | ECE % (15 bins) | AURC x 1000 |',
            '| baseline: the teacher | 78.5 |  | 0.6 | 1.25 | 60.5 |',
            '| this model | 81.25 | 99.5 | 0.4321 | 2.345 | 45.6 |',
            f'`hf-hub:org/net@{40 * "a"}`; logits divided by T_c = 1.875.',
            '| `aikd_alpha` | 0.3 |', '| `opt` | lamb |', '| `lr` | 0.005 |', '| `model_ema_decay` | 0.99 |',
            '| `seed` | 0 |',
            'moving average of the weights after epoch 3', 'of 2,048 of these images', 'not an untouched test set',
            'hf-hub:me/net', 'kim2024aikd', 'input 3 x 160 x 160',
    ):
        assert line in text, line
    assert 'somebody' not in text and '/home' not in text


@pytest.mark.parametrize('teacher, shown', [
    ('/home/somebody/runs/phase1', 'phase1'), ('local-dir:/home/somebody/kept', 'kept'), ('../x/y.pth', 'y.pth'),
    ('test_resnet', 'test_resnet'),
])
def test_a_local_teacher_is_named_without_its_path(tmp_path, teacher, shown):
    save_run(tmp_path, source(1), state(teacher=teacher), SUMMARY)
    text = card_of(tmp_path)
    assert f'Teacher: `{shown}`' in text and f'| `aikd_teacher` | {shown} |' in text and 'somebody' not in text
    assert (ModelCard(text).data.base_model == ['timm/test_resnet.r160_in1k']) == (teacher == 'test_resnet')


def test_several_teachers_are_named(tmp_path):
    save_run(tmp_path, source(1), state(teacher=['hf-hub:org/net', '/home/somebody/phase1']), SUMMARY)
    text = card_of(tmp_path)
    assert 'Teacher: `hf-hub:org/net`, `phase1` (a local model); logits divided' in text
    assert '| `aikd_teacher` | hf-hub:org/net phase1 |' in text
    assert ModelCard(text).data.base_model == ['org/net'] and 'somebody' not in text


def test_a_plain_run_has_a_card_without_what_it_did_not_do(tmp_path):
    save_run(tmp_path, source(1), None, SUMMARY, pretrained=True)
    text = card_of(tmp_path)
    assert 'without distillation' in text and '| this model | 81.25 |' in text and 'baseline' not in text
    assert 'aikd_alpha' not in text and 'Teacher' not in text and 'kim2024aikd' not in text
    assert ModelCard(text).data.base_model == ['timm/test_resnet.r160_in1k']


def test_a_run_without_validation_has_a_card_without_results(tmp_path):
    save_run(tmp_path, source(1), state(), 'epoch,train_loss\n3,1.4\n')
    text = card_of(tmp_path)
    assert '## Results' not in text and ModelCard(text).data.eval_results is None


def code_of(card, folder):
    """The card's Python, with this machine's path of the model."""
    code, = re.findall('```python\n(.*?)```', card, re.DOTALL)
    return code.replace('local-dir:PATH', f'local-dir:{folder}')


@pytest.mark.parametrize('words, temperature', [(['--temperature', '2.5'], 2.5), ([], 1.)])
@pytest.mark.parametrize('channels, names', [(3, list('abcde')), (1, None)])
def test_the_code_in_the_card_runs(tmp_path, monkeypatch, command, capsys, words, temperature, channels, names):
    monkeypatch.chdir(tmp_path)
    model = source(1, in_chans=channels)
    save_run(tmp_path / 'run', model, state() if names else None, in_chans=channels)
    image = Image.effect_noise((80, 80), 90)
    image.save('image.jpg')
    assert command('push', 'run', '--to-folder', 'kept', *words)[0] == 0
    config = json.loads((tmp_path / 'kept' / 'config.json').read_text())
    assert config.get('temperature') == (2.5 if words else None)
    exec(code_of((tmp_path / 'kept' / 'README.md').read_text(), 'kept'), {})
    transform = timm.data.create_transform(**timm.data.resolve_data_config(
        {}, pretrained_cfg=config['pretrained_cfg']), is_training=False)
    image = Image.open('image.jpg').convert('RGB' if channels == 3 else 'L')
    expected = (logits(model, transform(image)[None])[0] / temperature).softmax(-1)
    lines = [f'{names[i] if names else i}: {expected[i]:.1%}' for i in expected.argsort(descending=True)[:3].tolist()]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_card_names_classes_and_data_set_and_tells_of_the_temperature(tmp_path, command):
    save_run(tmp_path / 'run', source(1), state(), SUMMARY)
    (tmp_path / 'names').write_text('ant|eater\nbee\ncat\ndog\nelk\n')
    words = ['--dataset-name', 'Five animals', '--class-map', tmp_path / 'names', '--temperature', '1.25']
    assert command('push', tmp_path / 'run' / 'model_best.pth.tar', '--to-folder', tmp_path / 'kept', *words)[0] == 0
    text = (tmp_path / 'kept' / 'README.md').read_text()
    assert r'## Classes' in text and r'ant\|eater, bee, cat, dog, elk' in text
    assert 'flowers' not in text and '5 classes of Five animals' in text and 'Data set: Five animals' in text
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {'Five animals'}
    assert 'temperature = 1.25' in text and 'scales the logits by a temperature' in text


def test_many_classes_are_not_all_in_the_card(tmp_path):
    save_run(tmp_path, source(1, num_classes=120), {**state(), 'class_names': [f'class{i}' for i in range(120)]})
    text = card_of(tmp_path)
    assert 'class99, and 20 more in config.json' in text and 'class100' not in text


@pytest.mark.parametrize('args, shown, hidden', [
    ({'mixup': 0., 'cutmix': 0., 'mixup_mode': 'batch'}, [], ['mixup_mode']),
    ({'mixup': 0., 'cutmix': 1., 'mixup_mode': 'elem'}, ['cutmix', 'mixup_mode'], []),
    ({'bce_loss': False, 'bce_target_thresh': 0.2, 'clip_mode': 'norm'}, [], ['bce_target_thresh', 'clip_mode']),
    ({'no_aug': True, 'aa': 'rand-m9', 'hflip': 0.5}, ['no_aug'], ['aa', 'hflip']),
    ({'aa': 'rand-m9', 'hflip': 0.5}, ['aa', 'hflip'], ['no_aug']),
])
def test_the_recipe_has_only_what_had_an_effect(tmp_path, args, shown, hidden):
    save_run(tmp_path, source(1), **args)
    text = card_of(tmp_path)
    assert all(f'| `{name}` |' in text for name in shown) and not any(f'| `{name}` |' in text for name in hidden)


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_the_umask(tmp_path, command, umask, mode):
    save_run(tmp_path / 'run', source(1), None, SUMMARY)
    before = os.umask(umask)
    try:
        assert command('push', tmp_path / 'run', '--to-folder', tmp_path / 'kept')[0] == 0
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / 'kept').iterdir()} == dict.fromkeys(
        ('README.md', 'config.json', 'curves.png', 'model.safetensors'), mode)


def test_the_citation_is_the_readmes():
    assert CITATION in (ROOT / 'README.md').read_text()


def test_a_summary_of_a_resumed_run_is_read_by_its_last_header(tmp_path):
    again = 'epoch,train_loss,eval_top1,eval_loss\n3,1.1,90.5,0.25\n'
    save_run(tmp_path, source(1), state(), SUMMARY + again)
    run_ = FinishedRun.read(tmp_path)
    assert [row['epoch'] for row in run_.epochs] == ['2', '3']
    assert run_.metrics() == {'eval_top1': 90.5, 'eval_loss': 0.25}


@pytest.mark.parametrize('args', [
    {'model_kwargs': {}, 'initial_checkpoint': '../somebody/private/x.pth'},
    {'initial_checkpoint': 'local-dir:/home/somebody/x'},
])
def test_no_path_of_an_argument_gets_into_the_card(tmp_path, args):
    save_run(tmp_path, source(1), state(teacher_model='local-dir:/home/somebody/base'), SUMMARY, **args)
    text = card_of(tmp_path)
    assert 'somebody' not in text and '| `initial_checkpoint` | x' in text and '| `aikd_teacher_model` | base |' in text


def test_a_run_that_started_from_a_published_model_has_the_names_of_its_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_for_hf(source(1), 'base', safe_serialization=True, model_config={'label_names': list('edcba')})
    for folder, kept in (('plain', None), ('ours', state())):
        save_run(tmp_path / folder, source(1), kept, model='local-dir:base')
        run_ = FinishedRun.read(tmp_path / folder)
        assert run_.class_names == (list('abcde') if kept else None)
        assert 'local-dir:' not in model_card(run_, 'me/net') and '| `model` | base |' in model_card(run_, 'me/net')


def test_a_run_that_diverged_is_not_published(tmp_path, command):
    model = source(1)
    with torch.no_grad():
        model.get_classifier().bias.fill_(float('nan'))
    code, _ = command(
        'push', save_run(tmp_path / 'run', model), '--to-folder', tmp_path / 'kept')
    assert 'the run diverged' in code and not (tmp_path / 'kept').exists()


def test_nothing_in_an_argument_breaks_the_tables(tmp_path):
    save_run(tmp_path, source(1), state(), SUMMARY, aa='rand|m9\n| x | y |', data_dir='a|b`<script>', opt='<b>')
    body = card_of(tmp_path).split('---\n', 2)[2]
    assert '<script>' not in re.sub(r'\\<', '', body) and r'rand\|m9 \| x \| y \|' in body


@pytest.mark.slow
def test_a_generation_is_the_teacher_of_the_next(image_folder, tmp_path):
    """Phase 1, its export as the teacher of phase 2, that on the Hub as the teacher of phase 3."""
    small = [
        training_scripts()['examples'], *SMALL_RUN, '--data-dir', image_folder, '--output', tmp_path, '--workers', '0']
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / 'home'), 'HF_TOKEN': 'hf_a_token_to_write'}
        run(*small, '--experiment', 'one')
        run('-m', 'timm_aikd', 'push', tmp_path / 'one', '--to-folder', tmp_path / 'first', **environment)
        run(*small, '--experiment', 'two', '--model-ema', '--model-ema-decay', '0.5', '--aikd', '--aikd-teacher',
            f'local-dir:{tmp_path / "first"}', '--aikd-memory', 'snapshot', **environment)
        pushed = run('-m', 'timm_aikd', 'push', tmp_path / 'two', 'hf-hub:me/second', **environment)
        assert f'{hub.url}/me/second: README.md, config.json, curves.png, model.safetensors' in pushed.stdout
        commit = hub.repositories['me/second'].commit('main')
        third = run(*small, '--experiment', 'three', '--aikd', '--aikd-teacher', 'hf-hub:me/second', **environment)
        assert f'teacher hf-hub:me/second@{commit}' in third.stderr and 'AI-KD: epoch 1' in third.stderr
        run('-m', 'timm_aikd', 'push', tmp_path / 'three', 'me/third', '--to-folder', tmp_path / 'third', **environment)
        loaded = run('-c', LOAD, 'hf-hub:me/second', **environment).stdout
        files = {name: path.read_bytes() for name, path in hub.repositories['me/second'].files(commit).items()}
    card = ModelCard(files['README.md'].decode())
    assert b'class0' in files['config.json'] and card.data.base_model is None and files['curves.png'][1:4] == b'PNG'
    third_card = ModelCard((tmp_path / 'third' / 'README.md').read_text())
    assert third_card.data.base_model == ['me/second'] and f'hf-hub:me/second@{commit}' in third_card.text
    for text in (card.content, third_card.content):
        assert str(tmp_path) not in text and 'hf_a_token' not in text
    second = timm.create_model('test_resnet', num_classes=3)
    second.load_state_dict(load_state_dict(tmp_path / 'two' / 'model_best.pth.tar', use_ema=True))
    input = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert json.loads(loaded) == logits(second, input).tolist()


def test_what_the_hub_does_not_take_is_said_in_one_line(tmp_path):
    save_run(tmp_path / 'run', source(1), state())
    with HubServer() as hub:
        for fragment, changed in {
                'log in with `hf auth login` or HF_TOKEN': {},
                'use one that may': {'HF_TOKEN': 'hf_a_token_to_read'},
                'unset HF_HUB_OFFLINE': {'HF_TOKEN': 'hf_a_token', 'HF_HUB_OFFLINE': '1'},
                'check the network and HF_ENDPOINT': {'HF_TOKEN': 'hf_a_token', 'HF_ENDPOINT': 'http://127.0.0.1:1'},
        }.items():
            hub.read_only = 'HF_TOKEN' in changed
            done = run('-m', 'timm_aikd', 'push', tmp_path / 'run', 'me/net', check=False, **{
                **hub.environment(tmp_path / 'home'), **changed})
            line, = done.stderr.splitlines()
            assert done.returncode == 1 and line.startswith('error: push me/net: the Hub did not take it')
            assert fragment in line and len(line) <= 300 and 'hf_a_token' not in line
        assert not hub.repositories and not hub.objects


def test_a_second_push_replaces_the_first(tmp_path):
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / 'home'), 'HF_TOKEN': 'hf_a_token'}
        for seed in (1, 2):
            save_run(tmp_path / 'run', source(seed), state())
            done = run('-m', 'timm_aikd', 'push', tmp_path / 'run', 'me/net', **environment)
            assert ('are replaced' in done.stdout) == (seed == 2)
        refused = run('-m', 'timm_aikd', 'push', tmp_path / 'run', 'me/net', '--private', check=False, **environment)
        assert refused.stderr.startswith('error: --private: me/net exists and is public')
        folder = hub.repositories['me/net'].folders[hub.repositories['me/net'].commit('main')]
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    input = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(again, input), logits(source(2), input))


LOAD = """
import json, sys, timm, torch
torch.set_num_threads(1)
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    print(json.dumps(model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).tolist()))
"""


@pytest.mark.parametrize('words, fragment', [
    (['RUN'], 'where to? give ORG/NAME, or --to-folder PATH'),
    (['RUN', 'net'], 'net is no repository of the Hub: write ORG/NAME'),
    (['RUN', 'a/../b'], 'is no repository of the Hub'),
    (['RUN', 'me/net@main'], 'is no repository of the Hub'),
    (['missing', 'me/net'], 'push missing: no such file or folder'),
    (['empty', '--to-folder', 'x'], 'has no model_best.pth.tar; give the output folder of a run'),
    (['RUN', '--to-folder', 'x', '--checkpoint', 'last.pth.tar'],
     'run: has no last.pth.tar; it has model_best.pth.tar: choose with --checkpoint'),
    (['run/other.pth.tar', '--to-folder', 'x'], 'push run/other.pth.tar: no such file or folder'),
    (['run/model_best.pth.tar', '--to-folder', 'x', '--checkpoint', 'last.pth.tar'], '--checkpoint last.pth.tar: '),
    (['RUN', '--to-folder', 'x', '--temperature', '0'], '--temperature 0.0: allowed is a number > 0'),
    (['RUN', '--to-folder', 'x', '--temperature', 'nan'], '--temperature nan: allowed is a number > 0'),
    (['RUN', '--to-folder', 'x', '--import', 'not_there'], '--import not_there: cannot be imported (ModuleNotFound'),
    (['bare', '--to-folder', 'x'], 'stores no arguments of a training script'),
    (['broken', '--to-folder', 'x'], 'not readable as weights'),
    (['RUN', '--to-folder', 'full'], '--to-folder full: is there already'),
    (['RUN', '--to-folder', 'full/file'], '--to-folder full/file: is there already'),
    (['RUN', '--to-folder', 'full/file/x'], 'push: cannot write to '),
    (['RUN', '--to-folder', 'x', '--class-map', 'nowhere'], '--class-map nowhere: cannot be read as text'),
    (['RUN', '--to-folder', 'x', '--class-map', 'names'], 'has 2 names (2 different), the model has 5 classes'),
])
def test_what_cannot_be_pushed_is_said_in_one_line(tmp_path, monkeypatch, command, words, fragment):
    monkeypatch.chdir(tmp_path)
    save_run(Path('run'), source(1))
    for name in ('empty', 'bare', 'broken', 'full'):
        Path(name).mkdir()
    Path('full/file').touch()
    Path('names').write_text('a\nb\n')
    Path('broken/model_best.pth.tar').write_bytes(b'nothing')
    torch.save({'state_dict': source(1).state_dict(), 'model': 'x'}, 'bare/model_best.pth.tar')
    before = sorted(map(str, tmp_path.rglob('*')))
    code, out = command('push', *('run' if word == 'RUN' else word for word in words))
    assert isinstance(code, str) and code.startswith('error: ') and fragment in code, code
    assert '\n' not in code and len(code) <= 300 and '--aikd' not in code
    assert sorted(map(str, tmp_path.rglob('*'))) == before


def test_class_names_come_from_a_file_or_are_missed(tmp_path, command):
    save_run(tmp_path / 'run', source(1))
    (tmp_path / 'names').write_text('ant\nbee\ncat\ndog\nelk\n')
    code, out = command('push', tmp_path / 'run', '--to-folder', tmp_path / 'a')
    assert code == 0 and 'does not tell its class names' in out
    code, out = command('push', tmp_path / 'run', '--to-folder', tmp_path / 'b', '--class-map', tmp_path / 'names')
    assert code == 0 and 'class names' not in out
    config = json.loads((tmp_path / 'b' / 'config.json').read_text())
    assert config['label_names'] == ['ant', 'bee', 'cat', 'dog', 'elk']


@pytest.mark.parametrize('fault', ['disk full', 'another model'])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, command, fault):
    save_run(tmp_path / 'run', source(1))

    def save(model, folder, **options):
        if fault == 'disk full':
            Path(folder, 'model.safetensors').write_bytes(b'half')
            raise OSError(28, os.strerror(28), str(folder))
        timm.models.save_for_hf(source(2), folder, **options)

    monkeypatch.setattr(publish, 'save_for_hf', save)
    code, out = command('push', tmp_path / 'run', '--to-folder', tmp_path / 'kept')
    assert ('No space left on device' if fault == 'disk full' else 'gives other outputs') in code
    assert [path.name for path in tmp_path.iterdir()] == ['run']
