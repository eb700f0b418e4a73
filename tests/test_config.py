"""Options: the good, the bad, and the places that must agree with them."""
import argparse
import ast
import re
from dataclasses import fields

import pytest

import timm_aikd
from timm_aikd import AikdConfig, AikdError
from timm_aikd.script.options import add_arguments, config_of

from .conftest import ROOT

GOOD = [
    {},
    {'teacher': 'none', 'alpha': 0, 'kd_weight': 0, 'adv_weight': 0},
    {'alpha': 1, 'temperature': 1e-3, 'progressive_temperature': 100, 'teacher_temperature': 2},
    {'adv_loss': 'wgan-gp', 'disc_input': 'logits', 'disc_hidden': [8, 8, 8], 'disc_opt': 'lamb', 'adv_warmup': 2.5},
    {'feature_weight': 1, 'kd_weight': 0, 'adv_weight': 0},
    {'disc_hidden': 16, 'teacher_temperature': 'auto', 'teacher_dtype': 'bfloat16', 'memory': 'snapshot'},
]
BAD = [
    ({'kd_weight': -0.1}, '`kd_weight` -0.1: allowed is number >= 0'),
    ({'feature_weight': 3, 'teacher': 'none'}, '`feature_weight` 3: needs a `teacher`'),
    ({'feature_weight': -1}, '`feature_weight` -1: allowed is number >= 0'),
    ({'kd_weight': float('inf')}, 'numbers must be finite'),
    ({'kd_weight': float('nan')}, 'numbers must be finite'),
    ({'kd_weight': '1'}, "`kd_weight` '1'"),
    ({'kd_weight': True}, '`kd_weight` True'),
    ({'kd_weight': None}, '`kd_weight` None'),
    ({'temperature': 0}, 'number > 0'),
    ({'temperature': -2.}, 'number > 0'),
    ({'alpha': 1.01}, 'number >= 0 and <= 1'),
    ({'alpha': [0.5]}, '`alpha`'),
    ({'progressive_temperature': 0.}, 'number > 0'),
    ({'teacher_temperature': 0}, 'number > 0, or auto'),
    ({'teacher_temperature': 'best'}, 'number > 0, or auto'),
    ({'adv_weight': -1}, 'number >= 0'),
    ({'adv_loss': 'gan'}, 'bce, hinge, lsgan, wgan, wgan-gp'),
    ({'adv_warmup': -1}, 'number >= 0'),
    ({'disc_input': 'softmax'}, 'probs, log-probs, logits'),
    ({'disc_hidden': [0]}, 'whole number >= 1'),
    ({'disc_hidden': [16, 1.5]}, 'whole number >= 1'),
    ({'disc_hidden': 'wide'}, 'whole number >= 1'),
    ({'disc_opt': ''}, '`disc_opt`'),
    ({'disc_opt': None}, '`disc_opt`'),
    ({'disc_lr': 0}, 'number > 0'),
    ({'memory': 'disk'}, 'auto, store, snapshot'),
    ({'seed': -1}, 'whole number >= 0'),
    ({'seed': 1.5}, 'whole number >= 0'),
    ({'teacher_dtype': 'int8'}, 'auto, float32, bfloat16, float16'),
    ({'teacher': 3}, '`teacher` 3'),
    ({'teacher': ''}, '`teacher`'),
]


@pytest.mark.parametrize('options', GOOD, ids=str)
def test_good_options_survive_the_checkpoint_and_the_command_line(options):
    config = AikdConfig(**options)
    assert AikdConfig(**config.to_dict()) == config
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ['--aikd']
    for name, value in config.to_dict().items():
        if value is not None:
            words += ['--aikd-' + name.replace('_', '-'), *map(str, value if isinstance(value, list) else [value])]
    args = parser.parse_args(words)
    assert args.aikd and config_of(args) == config


@pytest.mark.parametrize('options, message', BAD, ids=str)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(AikdError, match=re.escape(message)) as caught:
        AikdConfig(**options)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_yaml_values_reach_the_options_as_the_flags_do():
    """PyYAML reads 1e-3 as text; argparse converts defaults that are text."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(aikd=True, aikd_disc_lr='1e-3', aikd_disc_hidden=[8], aikd_alpha=0)
    config = config_of(parser.parse_args([]))
    assert (config.disc_lr, config.disc_hidden, config.alpha) == (0.001, (8,), 0)


def test_every_option_says_what_it_is():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions[2:]:
        assert len(action.help) > 10, action.dest
    assert {action.dest for action in parser._actions[2:]} == {f'aikd_{field.name}' for field in fields(AikdConfig)}


def test_teacher_none_switches_the_teachers_terms_off():
    assert not AikdConfig(teacher='none').has_teacher
    assert not AikdConfig(kd_weight=0, adv_weight=0).has_teacher
    assert AikdConfig(kd_weight=0).has_teacher


def test_what_type_checkers_see_of_the_package_is_what_it_exports():
    tree = ast.parse((ROOT / 'timm_aikd' / '__init__.py').read_text())
    block, = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == timm_aikd._HOME
