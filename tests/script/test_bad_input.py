"""What is wrong on the command line, in a file or in the environment is told in one line, and costs nothing.

Each row of the tables is a command, as a user would type it in a folder of good and bad files, and what the last line
on standard error must say: the flag or file, the value, and the remedy or what is allowed. Whatever the row, the
command ends with exit code 1 or 2, without a traceback, and leaves every file as it was. Most rows run in this process,
which spares them the start of Python; `PROCESSES` are as the user's.
"""
import contextlib
import errno
import io
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf

from timm_aikd import Aikd, AikdConfig
from timm_aikd.__main__ import main
from timm_aikd.script import autoload, bindings

from ..conftest import ROOT, SMALL_RUN, run, unwatch_parsers, write_images
from ..support.teachers import arguments, save, source

# what the script and timm warn of is not ours to fail on
pytestmark = pytest.mark.filterwarnings('ignore')

SECONDS = 20
TRAIN = ['run', str(ROOT / 'examples' / 'train.py'), *SMALL_RUN, '-j', '0', '--output', 'out', '--experiment', 'x']
GOOD = [*TRAIN, '--data-dir', 'data', '--aikd', '--aikd-teacher', 'good.pth']

# appended to a run that would be fine
FLAGS = [
    ("--aikd-teacher ''", "--aikd-teacher '': allowed is text"),
    ('--aikd-teacher', 'argument --aikd-teacher: expected at least one argument'),
    ("--aikd-teacher-model ''", "--aikd-teacher-model '': allowed is text"),
    ('--aikd-teacher-model resnet_of_mine', "no such architecture 'resnet_of_mine'", '--aikd-teacher-model'),
    ('--aikd-teacher-model ../../x', "no such architecture '../../x'", '--aikd-teacher-model'),
    ('--aikd-teacher-model local-dir:/nowhere', "no such architecture 'local-dir:/nowhere'", '--aikd-teacher-model'),
    ('--aikd-teacher-model test_vit', 'these weights are not those of a test_vit', '--aikd-teacher-model'),
    ('--aikd-teacher-dtype int8', "--aikd-teacher-dtype 'int8': allowed is auto, float32, bfloat16, float16"),
    ("--aikd-teacher-dtype ''", "--aikd-teacher-dtype '': allowed is auto"),
    ('--aikd-teacher-size 0', '--aikd-teacher-size 0: allowed is whole number >= 1 and <= 8192'),
    ('--aikd-teacher-size 8193', '--aikd-teacher-size 8193: allowed is whole number'),
    ('--aikd-teacher-size -224', '--aikd-teacher-size -224: allowed is whole number'),
    ('--aikd-teacher-size 64.5', "argument --aikd-teacher-size: invalid int value: '64.5'"),
    ('--aikd-teacher-temperature 0', '--aikd-teacher-temperature 0.0: allowed is number > 0, or auto'),
    ('--aikd-teacher-temperature -1', '--aikd-teacher-temperature -1.0: allowed is number > 0'),
    ('--aikd-teacher-temperature nan', '--aikd-teacher-temperature nan', 'numbers must be finite'),
    ('--aikd-teacher-temperature 1e999', '--aikd-teacher-temperature inf', 'numbers must be finite'),
    ('--aikd-teacher-temperature hot', "--aikd-teacher-temperature: invalid number or auto value: 'hot'"),
    ('--aikd-kd-weight -0.5', '--aikd-kd-weight -0.5: allowed is number >= 0'),
    ('--aikd-kd-weight nan', '--aikd-kd-weight nan: allowed is number >= 0', 'numbers must be finite'),
    ('--aikd-kd-weight 1,5', "argument --aikd-kd-weight: invalid float value: '1,5'"),
    ('--aikd-temperature 0', '--aikd-temperature 0.0: allowed is number > 0'),
    ('--aikd-temperature inf', '--aikd-temperature inf: allowed is number > 0; numbers must be finite'),
    ('--aikd-temperature warm', "argument --aikd-temperature: invalid float value: 'warm'"),
    ('--aikd-alpha 1.1', '--aikd-alpha 1.1: allowed is number >= 0 and <= 1'),
    ('--aikd-alpha -0.1', '--aikd-alpha -0.1: allowed is number >= 0 and <= 1'),
    ('--aikd-alpha 50%', "argument --aikd-alpha: invalid float value: '50%'"),
    ('--aikd-progressive-temperature 0', '--aikd-progressive-temperature 0.0: allowed is number > 0'),
    ('--aikd-progressive-temperature x', "argument --aikd-progressive-temperature: invalid float value: 'x'"),
    ('--aikd-feature-weight -1', '--aikd-feature-weight -1.0: allowed is number >= 0'),
    ('--aikd-teacher none --aikd-feature-weight 3', '--aikd-feature-weight 3: needs a --aikd-teacher, not none'),
    ('--aikd-adv-weight -1', '--aikd-adv-weight -1.0: allowed is number >= 0'),
    ('--aikd-adv-weight x', "argument --aikd-adv-weight: invalid float value: 'x'"),
    ('--aikd-adv-loss gan', "--aikd-adv-loss 'gan': allowed is bce, hinge, lsgan, wgan, wgan-gp"),
    ('--aikd-adv-loss BCE', "--aikd-adv-loss 'BCE': allowed is bce, hinge, lsgan, wgan, wgan-gp"),
    ('--aikd-adv-warmup -1', '--aikd-adv-warmup -1.0: allowed is number >= 0'),
    ('--aikd-adv-warmup 3epochs', "argument --aikd-adv-warmup: invalid float value: '3epochs'"),
    ('--aikd-disc-input softmax', "--aikd-disc-input 'softmax': allowed is probs, log-probs, logits"),
    ("--aikd-disc-input ''", "--aikd-disc-input '': allowed is probs, log-probs, logits"),
    ('--aikd-disc-hidden', 'argument --aikd-disc-hidden: expected at least one argument'),
    ('--aikd-disc-hidden 8 0', '--aikd-disc-hidden 0: allowed is whole number >= 1 and <= 65536'),
    ('--aikd-disc-hidden 65537', '--aikd-disc-hidden 65537: allowed is whole number >= 1 and <= 65536'),
    ('--aikd-disc-hidden 8,8', "argument --aikd-disc-hidden: invalid int value: '8,8'"),
    ('--aikd-disc-opt nonsense', '--aikd-disc-opt nonsense: cannot be used', 'timm.optim.list_optimizers()'),
    ('--aikd-disc-opt adahessian', '--aikd-disc-opt adahessian: cannot be used', 'second-order', 'list_optimizers()'),
    ('--aikd-disc-opt kron', '--aikd-disc-opt kron: cannot be used', 'the global random stream', 'list_optimizers()'),
    ("--aikd-disc-opt ''", "--aikd-disc-opt '': allowed is text"),
    ('--aikd-disc-lr 0', '--aikd-disc-lr 0.0: allowed is number > 0'),
    ('--aikd-disc-lr -1', '--aikd-disc-lr -1.0: allowed is number > 0'),
    ('--aikd-disc-lr 1e-3e', "argument --aikd-disc-lr: invalid float value: '1e-3e'"),
    ('--aikd-memory disk', "--aikd-memory 'disk': allowed is auto, store, snapshot"),
    ('--aikd-memory-topk 0', '--aikd-memory-topk 0: allowed is whole number >= 1 and <= 1048576, or auto'),
    ('--aikd-memory-topk 1048577', '--aikd-memory-topk 1048577: allowed is whole number >= 1 and <= 1048576, or auto'),
    ('--aikd-memory-topk all', "argument --aikd-memory-topk: invalid number or auto value: 'all'"),
    ('--aikd-memory-topk 4', '--aikd-memory-topk 4: allowed is 1 to the number of classes, 3'),
    ("--aikd-memory-dir ''", "--aikd-memory-dir '': allowed is text"),
    ('--aikd-memory-dir nowhere', '--aikd-memory-dir nowhere: cannot be written to (No such file', 'existing folder'),
    ('--aikd-memory-dir text.pth', '--aikd-memory-dir text.pth: cannot be written to (Not a directory)', 'existing'),
    ('--aikd-memory-dir /proc', '--aikd-memory-dir /proc: cannot be written to', 'name an existing folder'),
    (f'--aikd-memory-dir {"a" * 300}', '--aikd-memory-dir aaaa', 'File name too long', 'name an existing folder'),
    ('--aikd-seed -1', '--aikd-seed -1: allowed is whole number >= 0 and <= 9223372036854775807'),
    ('--aikd-seed 9223372036854775808', '--aikd-seed 9223372036854775808: allowed is whole number'),
    ('--aikd-seed 1.5', "argument --aikd-seed: invalid int value: '1.5'"),
    ('--aikd=yes', "argument --aikd: ignored explicit argument 'yes'"),
    ('--aikd-kd-wieght 1', 'unrecognized arguments: --aikd-kd-wieght 1', 'did you mean --aikd-kd-weight'),
    ('--batchsize 5', 'unrecognized arguments: --batchsize 5'),
    ('-b 64', '--batch-size 64', 'at most 6'),
    ('--data-dir lacking', '--val-split validation', "no images of class 'class1'", '--class-map'),
    ('--data-dir surplus', '--val-split validation', "images of a class 'aaa'", '--class-map'),
]

# the lines of a file given with --config to a run that would be fine
YAML = [
    ('aikd: "false"', "--aikd 'false': allowed is true or false, without quotes"),
    ('aikd: [true]', '--aikd [True]: allowed is true or false'),
    ('aikd: 2', '--aikd 2: allowed is true or false'),
    ('aikd_teacher: 3', '--aikd-teacher 3: allowed is text'),
    ('aikd_teacher: []', '--aikd-teacher []: an empty list'),
    ('aikd_teacher: [good.pth, 3]', '--aikd-teacher 3: allowed is text'),
    ('aikd_teacher: [good.pth, none]', '--aikd-teacher good.pth none', 'leave it out'),
    ('aikd_teacher: {hf-hub: org/net}', "--aikd-teacher {'hf-hub': 'org/net'}: allowed is text"),
    ('aikd_teacher: "a\\0b.pth"', '--aikd-teacher a b.pth: no such file'),
    ('aikd_teacher: "a\\nb"', '--aikd-teacher a b: no such file, folder or timm model'),
    ('aikd_teacher: "\\e[31mgood"', '--aikd-teacher [31mgood: no such file, folder or timm model'),
    ('aikd_teacher_model: 18', '--aikd-teacher-model 18: allowed is text'),
    ('aikd_teacher_model: [resnet18]', "--aikd-teacher-model ['resnet18']: allowed is text"),
    ('aikd_teacher_dtype: 16', '--aikd-teacher-dtype 16: allowed is auto, float32, bfloat16, float16'),
    ('aikd_teacher_dtype: null', '--aikd-teacher-dtype None: allowed is auto'),
    ('aikd_teacher_size: 64.5', '--aikd-teacher-size 64.5: allowed is whole number >= 1 and <= 8192'),
    ('aikd_teacher_size: [64, 64]', '--aikd-teacher-size [64, 64]: allowed is whole number'),
    ('aikd_teacher_size: true', '--aikd-teacher-size True: allowed is whole number'),
    ('aikd_teacher_temperature: [1.5]', '--aikd-teacher-temperature [1.5]: allowed is number > 0, or auto'),
    ('aikd_teacher_temperature: hot', "argument --aikd-teacher-temperature: invalid number or auto value: 'hot'"),
    ('aikd_teacher_temperature: {auto: 1}', "--aikd-teacher-temperature {'auto': 1}: allowed is number > 0, or auto"),
    ('aikd_kd_weight: true', '--aikd-kd-weight True: allowed is number >= 0'),
    ('aikd_kd_weight: .inf', '--aikd-kd-weight inf: allowed is number >= 0; numbers must be finite'),
    ('aikd_kd_weight: {a: 1}', "--aikd-kd-weight {'a': 1}: allowed is number >= 0"),
    ('aikd_kd_weight: 2024-01-01', '--aikd-kd-weight datetime.date(2024, 1, 1): allowed is number >= 0'),
    ('aikd_kd_weight: 1' + 400 * '0', '--aikd-kd-weight 1000', '000: allowed is number >= 0'),
    ('aikd_temperature: 0', '--aikd-temperature 0: allowed is number > 0'),
    ('aikd_temperature: [[[]]]', '--aikd-temperature [[[]]]: allowed is number > 0'),
    ('aikd_alpha: 2', '--aikd-alpha 2: allowed is number >= 0 and <= 1'),
    ('aikd_alpha: null', '--aikd-alpha None: allowed is number >= 0 and <= 1'),
    ('aikd_alpha: ' + str(list(range(300))), '--aikd-alpha [0, 1,', '298, 299]: allowed is number >= 0 and <= 1'),
    ('aikd_progressive_temperature: -2', '--aikd-progressive-temperature -2: allowed is number > 0'),
    ('aikd_feature_weight: false', '--aikd-feature-weight False: allowed is number >= 0'),
    ('aikd_adv_weight: false', '--aikd-adv-weight False: allowed is number >= 0'),
    ('aikd_adv_loss: [bce]', "--aikd-adv-loss ['bce']: allowed is bce, hinge, lsgan, wgan, wgan-gp"),
    ('aikd_adv_warmup: {}', '--aikd-adv-warmup {}: allowed is number >= 0'),
    ('aikd_disc_input: 1', '--aikd-disc-input 1: allowed is probs, log-probs, logits'),
    ('aikd_disc_hidden: [8, 0]', '--aikd-disc-hidden 0: allowed is whole number >= 1 and <= 65536'),
    ('aikd_disc_hidden: [[8]]', '--aikd-disc-hidden [8]: allowed is whole number'),
    ('aikd_disc_hidden: [8, x]', "--aikd-disc-hidden 'x': allowed is whole number"),
    ('aikd_disc_hidden: {a: 8}', "--aikd-disc-hidden {'a': 8}: allowed is whole number"),
    ('aikd_disc_hidden: null', '--aikd-disc-hidden None: allowed is whole number'),
    ('aikd_disc_opt: [adamw]', "--aikd-disc-opt ['adamw']: allowed is text"),
    ('aikd_disc_lr: 0', '--aikd-disc-lr 0: allowed is number > 0'),
    ('aikd_disc_lr: .nan', '--aikd-disc-lr nan: allowed is number > 0; numbers must be finite'),
    ('aikd_memory: 1', '--aikd-memory 1: allowed is auto, store, snapshot'),
    ('aikd_memory_topk: 2.5', '--aikd-memory-topk 2.5: allowed is whole number >= 1 and <= 1048576, or auto'),
    ('aikd_memory_topk: [1]', '--aikd-memory-topk [1]: allowed is whole number'),
    ('aikd_memory_dir: 1', '--aikd-memory-dir 1: allowed is text'),
    ('aikd_memory_dir: "a\\0b"', '--aikd-memory-dir a b: cannot be written to', 'name an existing folder'),
    ('aikd_seed: true', '--aikd-seed True: allowed is whole number >= 0'),
    ('aikd_seed: 1e3', "argument --aikd-seed: invalid int value: '1e3'"),
    ('aikd_alhpa: 1', 'config.yaml: unknown key aikd_alhpa', 'did you mean aikd_alpha'),
    ('aikd-teacher: good.pth', 'config.yaml: unknown key aikd-teacher', 'did you mean aikd_teacher'),
    ('3: 1', 'config.yaml: unknown key 3'),
    ('- aikd', 'config.yaml: not a YAML file of keys and values'),
    ('aikd', 'config.yaml: not a YAML file of keys and values'),
    ('aikd: [true', 'config.yaml: not a YAML file of keys and values'),
    ('!!python/object/apply:os.mkdir [executed]', 'config.yaml: not a YAML file of keys and values'),
]

# other arguments, which AI-KD cannot go with, and what it cannot do without
COMBINATIONS = [
    ('--aikd-alpha 0.5', '--aikd-alpha does nothing without --aikd: add --aikd or leave it out'),
    ('--aikd-teacher=good.pth --aikd-kd-weight 1', '--aikd-teacher does nothing without --aikd'),
    ('--aikd', '--aikd needs a teacher: --aikd-teacher with hf-hub:ORG/NAME'),
    ('--aikd --aikd-alpha 0 --aikd-kd-weight 0', '--aikd needs a teacher: --aikd-teacher with hf-hub:ORG/NAME'),
    ('--aikd --aikd-teacher good.pth --aikd-memory store --mixup 0.4', (
        '--aikd-memory store: --mixup 0.4 mixes the samples of a batch; use --aikd-memory snapshot')),
    ('--aikd --aikd-teacher good.pth --aikd-memory store --cutmix 1', (
        '--aikd-memory store: --cutmix 1.0 mixes the samples of a batch; use --aikd-memory snapshot')),
    ('--aikd --aikd-teacher none --aikd-memory store --dataset wds/x', (
        '--aikd-memory store: --dataset wds/x is an iterable data set'), 'use --aikd-memory snapshot'),
    ('--aikd --aikd-teacher none --num-classes 1', 'AI-KD needs at least 2 classes, the student has 1'),
    ('--aikd --aikd-teacher none --num-classes 0', 'AI-KD needs at least 2 classes, the student has 0'),
    ('--aikd --aikd-teacher none --epochs 0', '--epochs 0: with --aikd at least 1'),
    ('--aikd --aikd-teacher none --epochs -3', '--epochs -3: with --aikd at least 1'),
]

HUB_FORM = 'a Hub teacher is written hf-hub:ORG/NAME[@REVISION]'
TEACHERS = [
    ('missing.pth', '--aikd-teacher missing.pth: no such file'),
    ('/nowhere/model_best.pth.tar', '--aikd-teacher /nowhere/model_best.pth.tar: no such file: check the path'),
    (f'{"a" * 300}.pth', '--aikd-teacher aaaa', 'no such file: check the path'),
    (f'{"a" * 300}', '--aikd-teacher aaaa', 'or none'),
    (f'{"a/" * 2000}x.pth', '--aikd-teacher a/a/', 'a/x.pth: no such file: check the path'),
    ('resnet_of_nobody', '--aikd-teacher resnet_of_nobody: no such file, folder or timm model; allowed: hf-hub:ORG/'),
    ('org/net', 'org/net: no such file, folder or timm model; did you mean hf-hub:org/net'),
    ('http://hub/net.onnx', 'http://hub/net.onnx: no such file, folder or timm model; allowed: hf-hub:ORG/NAME'),
    ('None', '--aikd-teacher None: no such file, folder or timm model', 'or none'),
    ('text.txt', '--aikd-teacher text.txt: not readable as weights', '.safetensors'),
    ('folder', '--aikd-teacher folder: not the output of a run, it has no model_best.pth.tar; name a weights file'),
    ('kept', '--aikd-teacher kept: not the output of a run', 'use local-dir:kept'),
    ('.', '--aikd-teacher .: not the output of a run, it has no model_best.pth.tar'),
    ('folder.pth', '--aikd-teacher folder.pth: not the output of a run', 'name a weights file'),
    ('loop.pth', '--aikd-teacher loop.pth: no such file'),
    ('pipe.pth', '--aikd-teacher pipe.pth: no such file'),
    ('broken_run', 'broken_run/model_best.pth.tar: not readable as weights', 'save it again'),
    ('empty.pth', '--aikd-teacher empty.pth: not readable as weights, truncated', 'save it again or as .safetensors'),
    ('text.pth', '--aikd-teacher text.pth: not readable as weights', 'save it again or as .safetensors'),
    ('cut.pth', '--aikd-teacher cut.pth: not readable as weights, truncated', 'save it again or as .safetensors'),
    ('cut.safetensors', '--aikd-teacher cut.safetensors: not readable as weights, truncated', 'save it again'),
    ('text.safetensors', '--aikd-teacher text.safetensors: not readable as weights', 'save it again'),
    ('huge.safetensors', '--aikd-teacher huge.safetensors: not readable as weights', 'save it again'),
    ('good.pth.bin', '--aikd-teacher good.pth.bin: no such file'),
    ('list.pth', '--aikd-teacher list.pth: holds no state dict; save the weights as model.state_dict()'),
    ('optimizer.pth', '--aikd-teacher optimizer.pth: holds no state dict', 'optimizer, epoch', 'model.state_dict()'),
    ('vit.pth', '--aikd-teacher vit.pth: these weights are not those of a test_resnet', '--aikd-teacher-model'),
    ('classes.pth', '--aikd-teacher classes.pth: has 7 classes, the student has 3', 'train or choose a model of these'),
    ('channels.pth', '--aikd-teacher channels.pth: has 1 input channels, the student has 3', 'train or choose'),
    ('nan.pth', '--aikd-teacher nan.pth: its weights are not finite (conv1.0.weight)', 'choose an earlier checkpoint'),
    ('inf.safetensors', '--aikd-teacher inf.safetensors: its weights are not finite (fc.bias)', 'choose an earlier'),
    ('local-dir:nankept', '--aikd-teacher local-dir:nankept: its weights are not finite', 'choose an earlier'),
    ('unnamed.pth.tar', '--aikd-teacher unnamed.pth.tar: no such architecture', "['resnet18']", '--aikd-teacher-model'),
    ('misled.pth.tar', "misled.pth.tar: no such architecture 'local-dir:../nowhere'", '--aikd-teacher-model'),
    ('odd.pth.tar', '--aikd-teacher odd.pth.tar: its training arguments make no model', 'as model.state_dict()'),
    ('gray.pth.tar', '--aikd-teacher gray.pth.tar: its training arguments make no model', 'as model.state_dict()'),
    ('local-dir:', '--aikd-teacher local-dir:: no config.json in this folder; save_for_hf of timm writes one'),
    ('local-dir:nowhere', '--aikd-teacher local-dir:nowhere: no config.json in this folder; save_for_hf'),
    ('local-dir:good.pth', '--aikd-teacher local-dir:good.pth: no config.json in this folder'),
    ('local-dir:../../../../nowhere', 'nowhere: no config.json in this folder; save_for_hf of timm writes one'),
    (f'local-dir:{"a" * 300}', '--aikd-teacher local-dir:aaaa', 'no config.json in this folder'),
    ('local-dir:weightless', 'local-dir:weightless: could not be loaded', 'No suitable checkpoints', 'save it again'),
    ('hf-hub:', f'--aikd-teacher hf-hub:: {HUB_FORM}'),
    ('hf-hub:net', f'--aikd-teacher hf-hub:net: {HUB_FORM}'),
    ('hf-hub:a/b/c', f'--aikd-teacher hf-hub:a/b/c: {HUB_FORM}'),
    ('hf-hub:org/net@', f'--aikd-teacher hf-hub:org/net@: {HUB_FORM}'),
    ('hf-hub:org/net@v1@v2', HUB_FORM), ('hf-hub:org/net@v1;x', HUB_FORM), ('hf-hub:org/net@../../x', HUB_FORM),
    ('hf-hub:../../x@../..', f'--aikd-teacher hf-hub:../../x@../..: {HUB_FORM}'),
    ('hf-hub:org/../net', HUB_FORM), ('hf-hub:/etc/passwd', HUB_FORM), ('hf-hub:org/net@/etc', HUB_FORM),
    ('hf-hub:org/..', HUB_FORM), ("'hf-hub:org/net '", HUB_FORM), ('hf_hub:~/net', HUB_FORM),
    ('hf-hub:org/net%2f..', HUB_FORM), (f'hf-hub:org/{"a" * 300}/', '--aikd-teacher hf-hub:org/aaaa', HUB_FORM),
    ('hf-hub:https://me:hf_SecretSecret@hub/x', HUB_FORM),
]

# config.json of a folder that has good weights
CONFIGS = [
    ('[]', 'names no architecture', 'choose one that is'),
    ('{"architecture": "test_resnet"', 'its config.json is not JSON; save the model again with save_for_hf of timm'),
    ('{"architecture": 3}', 'names no architecture', 'choose one that is'),
    ('{"architecture": "os.system"}', "the architecture 'os.system', which timm", 'upgrade timm, or choose another'),
    ('{"architecture": "builtins:exec"}', "the architecture 'builtins:exec', which timm", 'or choose another'),
    ('{"architecture": "../../x"}', "the architecture '../../x', which timm", 'or choose another'),
    ('{"architecture": "hf-hub:org/net"}', "the architecture 'hf-hub:org/net', which timm", 'or choose another'),
    ('{"architecture": "local-dir:../kept"}', "the architecture 'local-dir:../kept', which timm", 'or choose another'),
    (f'{{"architecture": "{"a" * 4000}"}}', "the architecture 'aaaa", 'upgrade timm, or choose another'),
    ('{"architecture": "test_resnet", "pretrained_cfg": 7}', 'has pretrained_cfg', 'save_for_hf'),
    ('{"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": "x"}', 'has model_args', 'save_for_hf'),
    ('{"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {"block": "os.system"}}', (
        'could not be loaded as a timm model')),
    ('{"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {"checkpoint_path": "../good.pth"}}', (
        'could not be loaded as a timm model')),
    ('{"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {}, "model_args": {"features_only": true}}', (
        'its config.json has features_only')),
    ('{"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {}}', (
        'could not be loaded as a timm model')),
    ('{"architecture": "test_resnet", "num_classes": "many", "pretrained_cfg": {}}', (
        'could not be loaded as a timm model')),
    ('{"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"mean": "grey"}}', (
        "its config.json has mean 'grey', which is no use here")),
    ('{"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"label_names": 7}}', (
        "its config.json has label_names '7', which is no use here")),
    ('{"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"no_such_key": 7}}', (
        'could not be loaded as a timm model')),
]

# checkpoints given with --resume
RESUMED = [
    ('missing.pth.tar', '--resume missing.pth.tar: no such file'),
    ('folder', '--resume folder: is a folder', 'folder/last.pth.tar'),
    ('empty.pth', '--resume empty.pth: cannot be continued', 'another checkpoint'),
    ('text.pth', '--resume text.pth: cannot be continued', 'another checkpoint'),
    ('cut.pth', '--resume cut.pth: cannot be continued', 'another checkpoint'),
    ('vit.pth', '--resume vit.pth: cannot be continued', 'another checkpoint'),
    ('list.pth', '--resume list.pth: cannot be continued', 'another checkpoint'),
]

# what the key 'aikd' of a checkpoint's task state holds, or of its entries
STATES = [
    (7, 'state is 7', 'resume from another checkpoint'),
    ([], 'state is []', 'resume from another checkpoint'),
    ({'version': None}, 'version None', 'reads 1: install the timm-aikd that wrote it'),
    ({'version': 2}, 'version 2', 'reads 1: install the timm-aikd that wrote it'),
    ({'version': [1]}, 'version [1]', 'reads 1'),
    ({'config': None}, 'damaged', 'config', 'resume from another checkpoint'),
    ({'config': [1, 2]}, 'damaged', 'config', 'resume from another checkpoint'),
    ({'teacher_temperature': 'hot'}, 'damaged', 'teacher_temperature', 'resume from another checkpoint'),
    ({'teacher_temperature': -1.}, 'damaged', 'teacher_temperature', 'resume from another checkpoint'),
    ({'teacher_temperature': float('nan')}, 'damaged', 'teacher_temperature', 'resume from another checkpoint'),
    ({'memory': 'x'}, 'damaged', 'memory', 'resume from another checkpoint'),
    ({'memory': {'name': 'x'}}, 'damaged', 'memory', 'resume from another checkpoint'),
    ({'discriminator': {}}, "discriminator cannot be read: resume from another checkpoint"),
    ({'discriminator': {'weights': {}, 'optimizer': {}, 'generator': 0}}, 'cannot be read: resume from another'),
    ({'discriminator': [torch.ones(2)]}, 'discriminator', 'resume from another checkpoint'),
]

EVALUATED = [
    ('nowhere.pth data', 'error: nowhere.pth: no such file'),
    ('no_such_net data', 'error: no_such_net: no such file, folder or timm model'),
    ('none data', 'none', 'timm model'),
    ('good.pth', 'the following arguments are required: DATA'),
    ('', 'the following arguments are required: MODEL, DATA'),
    ('good.pth data', 'good.pth: stores no architecture; name its architecture', '--model-name'),
    ('good.pth data --model-name nonsense', "good.pth: no such architecture 'nonsense'", '--model-name'),
    ('good.pth data --model-name test_vit', 'good.pth: these weights are not those of a test_vit', '--model-name'),
    ('nan.pth data --model-name test_resnet', 'nan.pth: its weights are not finite', 'choose an earlier checkpoint'),
    ('cut.pth data', 'cut.pth: not readable as weights, truncated', 'save it again'),
    ('folder data', 'folder: not the output of a run, it has no model_best.pth.tar; name a weights file'),
    ('local-dir:classes data', 'has 7 classes, the data set has 3', 'train or choose'),
    ('hf-hub:../../x@../.. data', HUB_FORM),
    ('local-dir:kept nowhere', 'evaluate: DATA nowhere: no such folder'),
    ('local-dir:kept good.pth', 'evaluate: the data good.pth cannot be opened', 'check DATA'),
    ('local-dir:kept folder', 'evaluate: the data folder', 'check DATA'),
    ('local-dir:kept data --split test', '--split test: data has no such folder: name another'),
    ('local-dir:kept data --dataset torch/nothing', 'the data torch/nothing in data cannot be opened', '--dataset'),
    ('local-dir:kept data --class-map nowhere.txt', 'evaluate: the data data cannot be opened', '--class-map'),
    ('local-dir:kept data --bins 0', '--bins 0: allowed is a whole number >= 1'),
    ('local-dir:kept data --bins many', "argument --bins: invalid int value: 'many'"),
    ('local-dir:kept data -b 0', '--batch-size 0: allowed is a whole number >= 1'),
    ('local-dir:kept data -j -1', '--workers -1: allowed is a whole number >= 0'),
    ('local-dir:kept data --device abacus', '--device abacus: is not available here', 'such as cpu'),
    ('local-dir:kept data --device cuda:77', '--device cuda:77: is not available here', 'such as cpu'),
    ('local-dir:kept data --device meta', '--device meta: is not available here', 'such as cpu'),
    ("local-dir:kept data --device ''", "--device : is not available here", 'such as cpu'),
    ('local-dir:kept data --plot nowhere/x.png', '--plot nowhere/x.png: cannot be written', 'an existing folder'),
    ('local-dir:kept data --plot x.jpeg', '--plot x.jpeg: name a file that ends in .png'),
    ('local-dir:kept data --plot folder', '--plot folder: name a file that ends in .png'),
    ('local-dir:kept data --plot /proc/x.png', '--plot /proc/x.png: cannot be written', 'an existing folder'),
    ('local-dir:kept data --threads 4', 'unrecognized arguments: --threads 4'),
]

PUSHED = [
    ('', 'the following arguments are required: RUN_DIR'),
    ('run', 'push: where to? give ORG/NAME, or --to-folder PATH to upload nothing'),
    ('run net', 'push: net is no repository of the Hub: write ORG/NAME'),
    ('run ../../x', 'push: ../../x is no repository of the Hub: write ORG/NAME'),
    ('run org/net@main', 'push: org/net@main is no repository of the Hub: write ORG/NAME'),
    ('run org/a--b', 'push: org/a--b is no repository of the Hub: write ORG/NAME'),
    (f'run org/{"a" * 300}/', 'push: org/aaaa', 'is no repository of the Hub: write ORG/NAME'),
    ('nowhere org/net', 'push nowhere: no such file or folder'),
    (f'{"a" * 300} org/net', 'push aaaa'),
    ('good.pth org/net', 'push good.pth: stores no arguments of a training script', 'a run'),
    ('folder org/net', 'push folder: has no model_best.pth.tar; give the output folder of a run'),
    ('run org/net --checkpoint last.pth.tar', 'push run: has no last.pth.tar', 'model_best.pth.tar', '--checkpoint'),
    ('run org/net --checkpoint ../nowhere', 'push run: has no', 'nowhere; it has model_best.pth.tar', '--checkpoint'),
    ('. org/net --checkpoint good.pth', 'push good.pth: stores no arguments'),
    ('broken_run org/net', 'broken_run/model_best.pth.tar: not readable as weights', 'save it again'),
    ('. org/net --checkpoint misled.pth.tar', "misled.pth.tar: no such architecture 'local-dir:../nowhere'", 'name'),
    ('run --to-folder data', '--to-folder data: is there already: name a new or an empty folder'),
    ('. org/net --checkpoint state1.pth.tar', 'state is []', 'another checkpoint'),
    ('. org/net --checkpoint state7.pth.tar', "state is damaged (teacher_temperature 'hot')", 'another checkpoint'),
    ('run --to-folder good.pth', '--to-folder good.pth: is there already: name a new or an empty folder'),
    ('run --to-folder good.pth/x', 'push: cannot write to', 'good.pth', 'name another'),
    ('run --to-folder /proc/x', '/proc', 'name another'),
    (f'run --to-folder {"a" * 300}', 'push: cannot write to aaaa', 'name another'),
    ('run --to-folder new --class-map nowhere', '--class-map nowhere: cannot be read as text', 'check the file'),
    ('run --to-folder new --class-map folder', '--class-map folder: cannot be read as text', 'check the file'),
    ('run --to-folder new --class-map good.pth', '--class-map good.pth: cannot be read as text', 'check the file'),
    ('run --to-folder new --class-map text.txt', '--class-map text.txt: has 1 names', 'one name a line'),
    ('run org/net --publik', 'unrecognized arguments: --publik'),
]

LAUNCHED = [
    ('run nowhere.py', 'timm-aikd: cannot read nowhere.py: No such file or directory; give the path of a script'),
    ('run folder', 'timm-aikd: cannot read folder: Is a directory; give the path of a script'),
    ('folder', 'timm-aikd: cannot read folder: Is a directory; give the path of a script'),
    ('evaluat data', 'evaluat is neither a command (run, evaluate, push) nor the path of a script'),
    ('--verbose', '--verbose is neither a command (run, evaluate, push) nor the path of a script'),
    (f'run {"a" * 300}', 'timm-aikd: cannot read aaaa', 'File name too long; give the path of a script'),
    ("''", 'is neither a command (run, evaluate, push) nor the path of a script'),
    ('run other.py --aikd --aikd-teacher good.pth', 'unrecognized arguments: --aikd --aikd-teacher good.pth'),
    ('run early.py --aikd --aikd-teacher none', 'early.py has no ClassificationTask to hook into; supported is train'),
]

PROCESSES = [
    ('TRAIN --aikd-alpha 2', 2, {}, '--aikd-alpha 2.0: allowed is number >= 0 and <= 1'),
    ('TRAIN --aikd-teacher nan.pth', 1, {}, '--aikd-teacher nan.pth: its weights are not finite', 'choose an earlier'),
    ('TRAIN --aikd-teacher hf-hub:org/net', 1, {'HF_HUB_OFFLINE': '1', 'HF_HOME': 'nowhere'}, (
        '--aikd-teacher hf-hub:org/net: not in the cache, and the Hub is offline: unset HF_HUB_OFFLINE')),
    ('timm_aikd evaluate nowhere.pth data', 1, {}, 'error: nowhere.pth: no such file'),
    ('timm_aikd run nowhere.py', 1, {}, 'timm-aikd: cannot read nowhere.py: No such file'),
    ('timm_aikd folder', 1, {}, 'timm-aikd: cannot read folder: Is a directory; give the path of a script'),
    ('timm_aikd evaluat data', 1, {}, 'evaluat is neither a command (run, evaluate, push) nor the path of a script'),
]


def checkpoint(**entries):
    """What a run of the script leaves behind after its first epoch."""
    return {
        'epoch': 0, 'version': 2, 'arch': 'test_resnet', 'state_dict': source(num_classes=3).state_dict(),
        'args': arguments(num_classes=3, data_dir='data'), **entries}


@pytest.fixture(scope='module')
def playground(tmp_path_factory):
    """A folder of good and bad files; whoever writes into it fails its test."""
    folder, before = tmp_path_factory.mktemp('playground'), os.getcwd()
    os.chdir(folder)
    try:
        fill(folder)
    finally:
        os.chdir(before)
    return folder


def fill(folder):
    write_images(folder / 'data', per_class=2)
    for name in ('lacking', 'surplus'):
        write_images(folder / name, per_class=2)
    shutil.rmtree(folder / 'lacking/validation/class1')
    shutil.copytree(folder / 'data/train/class0', folder / 'surplus/validation/aaa')
    for name in ('folder', 'folder.pth', 'run', 'broken_run'):
        (folder / name).mkdir()
    good = source(num_classes=3)
    for name in ('good.pth', 'good.safetensors'):
        save(good, name)
    for name in ('empty.pth', 'text.pth', 'text.txt', 'text.safetensors', 'broken_run/model_best.pth.tar'):
        (folder / name).write_text('' if name.startswith('empty') else 'these are not the weights you are looking for')
    for name in ('cut.pth', 'cut.safetensors'):
        content = Path(name.replace('cut', 'good')).read_bytes()
        Path(name).write_bytes(content[:len(content) // 2])
    Path('huge.safetensors').write_bytes((2 ** 62).to_bytes(8, 'little') + Path('good.safetensors').read_bytes()[8:])
    os.symlink('loop.pth', 'loop.pth')
    os.mkfifo('pipe.pth')
    save(source(name='test_vit', num_classes=3), 'vit.pth')
    save(source(num_classes=7), 'classes.pth')
    save(source(num_classes=3, in_chans=1), 'channels.pth')
    torch.save([torch.ones(2)], 'list.pth')
    torch.save({'optimizer': {'state': {}, 'param_groups': []}, 'epoch': 3}, 'optimizer.pth')
    save(good, 'unnamed.pth.tar', model=['resnet18'])
    save(good, 'misled.pth.tar', model='local-dir:../nowhere')
    save(good, 'odd.pth.tar', model_kwargs=7)
    save(good, 'gray.pth.tar', mean='grey')
    save_for_hf(good, 'kept', safe_serialization=True)
    save_for_hf(source(num_classes=7), 'classes', safe_serialization=True)
    save_for_hf(good, 'weightless', safe_serialization=True)
    Path('weightless/model.safetensors').unlink()
    for number, (config, *_) in enumerate(CONFIGS):
        save_for_hf(good, f'config{number}', safe_serialization=True)
        Path(f'config{number}/config.json').write_text(config)
    torch.save(checkpoint(), 'run/model_best.pth.tar')
    options = AikdConfig(teacher='good.pth')
    valid = Aikd(3, source(num_classes=3), options).get_state()
    for number, (state, *_) in enumerate(STATES):
        state = {**valid, **state} if isinstance(state, dict) else state
        torch.save(checkpoint(task_state={'aikd': state}), f'state{number}.pth.tar')
    with torch.no_grad():
        good.fc.bias[1] = torch.inf
        save(good, 'inf.safetensors')
        good.conv1[0].weight[0, 0, 0, 0] = torch.nan
        save(good, 'nan.pth')
        save_for_hf(good, 'nankept', safe_serialization=True)
    Path('other.py').write_text('import argparse\nargparse.ArgumentParser().parse_args()\n')
    flags = ''.join(f'parser.add_argument("--{name.replace("_", "-")}")\n' for name in sorted(autoload.SIGNATURE))
    Path('early.py').write_text(f'import argparse\nparser = argparse.ArgumentParser()\n{flags}parser.parse_args()\n')


def listing(folder):
    """All that is in a folder, with sizes and times."""
    found = [(str(path), path.lstat()) for path in sorted(folder.rglob('*'))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def call(*words):
    """Exit code and standard error of `timm-aikd` with these words, in this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as changed, contextlib.redirect_stderr(error):
        changed.setattr(sys, 'argv', ['timm-aikd', *map(str, words)])
        changed.setattr(sys, 'path', sys.path[:])
        changed.setattr(sys, 'excepthook', sys.__excepthook__)
        changed.setitem(sys.modules, '__main__', sys.modules['__main__'])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException as failure:  # as Python ends
            sys.excepthook(type(failure), failure, failure.__traceback__)
            code = 1
        bindings.restore_all()
        unwatch_parsers()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    return code, error.getvalue()


def assert_refused(playground, words, *fragments):
    before, start = listing(playground), time.monotonic()
    code, error = call(*words)
    assert_one_line(code, error, fragments)
    assert time.monotonic() - start < SECONDS
    assert listing(playground) == before


def assert_one_line(code, error, fragments):
    assert 'Traceback' not in error, error[-3000:]
    assert code in (1, 2), error[-1000:]
    line = error.strip().splitlines()[-1]
    assert all(fragment in line for fragment in fragments) and len(line) <= 300, line
    assert line.isprintable()


@pytest.fixture
def here(playground, monkeypatch):
    monkeypatch.chdir(playground)
    return playground


def rows(table):
    return pytest.mark.parametrize('words, fragments', [
        pytest.param(words, fragments, id=str(words)[:60]) for words, *fragments in table])


@rows(FLAGS)
def test_flags(here, words, fragments):
    assert_refused(here, [*GOOD, *shlex.split(words)], *fragments)


@rows(YAML)
def test_yaml(here, tmp_path, words, fragments):
    (tmp_path / 'config.yaml').write_text(words)
    switch = [] if words.startswith('aikd:') else ['--aikd']
    teacher = [] if words.startswith('aikd_teacher:') else ['--aikd-teacher', 'good.pth']
    assert_refused(here, [*TRAIN, '--data-dir', 'data', *switch, *teacher, '--config', tmp_path / 'config.yaml'],
                   *fragments)


@pytest.mark.parametrize('table, form', [(FLAGS, '--aikd-{} '), (YAML, 'aikd_{}: ')])
def test_every_option_has_rows(table, form):
    for option in fields(AikdConfig):
        start = form.format(option.name.replace('_', '-') if form.startswith('--') else option.name)
        assert any(words.startswith(start) for words, *_ in table), start


@rows(COMBINATIONS)
def test_combinations(here, words, fragments):
    assert_refused(here, [*TRAIN, '--data-dir', 'data', *shlex.split(words)], *fragments)


@rows(TEACHERS)
def test_teachers(here, words, fragments):
    assert_refused(here, [*TRAIN, '--data-dir', 'data', '--aikd', '--aikd-teacher', *shlex.split(words)], *fragments)


@pytest.mark.parametrize('number', range(len(CONFIGS)), ids=[config[:60] for config, *_ in CONFIGS])
def test_configs_of_teachers(here, number):
    assert_refused(here, [*GOOD, '--aikd-teacher', f'local-dir:config{number}'],
                   f'--aikd-teacher local-dir:config{number}: ', *CONFIGS[number][1:])


@rows(RESUMED)
def test_resumed_files(here, words, fragments):
    assert_refused(here, [*GOOD, '--resume', words], *fragments)


@pytest.mark.parametrize('number', range(len(STATES)), ids=[str(state)[:60] for state, *_ in STATES])
def test_resumed_states(here, number):
    assert_refused(here, [*GOOD, '--resume', f'state{number}.pth.tar'], *STATES[number][1:])


@rows(EVALUATED)
def test_evaluate(here, words, fragments):
    assert_refused(here, ['evaluate', *shlex.split(words)], *fragments)


@rows(PUSHED)
def test_push(here, words, fragments):
    assert_refused(here, ['push', *shlex.split(words)], *fragments)


@rows(LAUNCHED)
def test_launched(here, words, fragments):
    assert_refused(here, shlex.split(words), *fragments)


@pytest.mark.parametrize('words, code, changed, fragments', [
    pytest.param(words, code, changed, fragments, id=f'{words} {changed or ""}')
    for words, code, changed, *fragments in PROCESSES])
def test_in_a_process_of_its_own(here, words, code, changed, fragments):
    before = listing(here)
    words = shlex.split(words)
    words = [*GOOD[1:], *words[1:]] if words[0] == 'TRAIN' else ['-m', *words]
    done = run(*words, check=False, **changed)
    assert_one_line(done.returncode, done.stderr, fragments)
    assert done.returncode == code and listing(here) == before


@pytest.mark.parametrize('words, fragments', [
    ([*GOOD, '--aikd-memory', 'store'], ['--aikd-memory store: the folder for temporary files', '--aikd-memory snap']),
    (['push', 'run', 'org/net'], ['push: cannot write to the folder for temporary files', 'name another folder']),
])
def test_no_folder_for_temporary_files(here, monkeypatch, words, fragments):
    """Where TMPDIR and the system's own are all missing or read-only."""
    def no_folder():
        raise FileNotFoundError(errno.ENOENT, 'No usable temporary directory found')

    monkeypatch.setattr(tempfile, 'tempdir', None)
    monkeypatch.setattr(tempfile, '_get_default_tempdir', no_folder)
    assert_refused(here, words, *fragments)


def test_a_good_run_is_not_refused(here, tmp_path):
    """That the rows are refused for what they say, and not for what all of them share."""
    code, error = call(*GOOD, '--output', tmp_path, '--epochs', '1', '--aikd-teacher-temperature', '1')
    assert code == 0 and (tmp_path / 'x' / 'last.pth.tar').is_file(), error


def test_there_are_enough_rows():
    tables = (FLAGS, YAML, COMBINATIONS, TEACHERS, CONFIGS, RESUMED, STATES, EVALUATED, PUSHED, LAUNCHED, PROCESSES)
    assert sum(map(len, tables)) >= 120
