"""The benchmark of a device runs, on tiny networks."""
from ..conftest import ROOT, run


def test_the_report_has_all_methods_and_recipes(device):
    script = ROOT / 'examples' / 'benchmarks' / 'step.py'
    # a budget that leaves the compiled networks out
    printed = run(script, '--device', device.type, '--small', '--rounds', '2', '--budget', '75').stdout
    for name in (
            'plain', 'timm, kd', 'AI-KD, kd alone', 'AI-KD, store', 'AI-KD, snapshot', 'AI-KD, store, 21,841 classes',
            'AI-KD, kd alone, teacher not folded', 'resnet50_imagenet.yaml', 'vit_small_imagenet.yaml'):
        assert f'\n| {name} | ' in printed, name
    assert 'Left out' in printed and 'test_vit, 32 px, batch 4, compiled' in printed
