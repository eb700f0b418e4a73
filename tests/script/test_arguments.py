"""What is told from a script's arguments."""
import argparse

import pytest
import torch
import torch.nn as nn

from timm_aikd.script import arguments


@pytest.mark.parametrize('words, epochs', [
    ([], 5), (['--cooldown-epochs', '2'], 7), (['--warmup-epochs', '3'], 5),
    (['--warmup-epochs', '3', '--warmup-prefix'], 8),
])
def test_counts_epochs_as_timms_scheduler_does(words, epochs):
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    parser = argparse.ArgumentParser()
    for name in ('epochs', 'cooldown', 'warmup'):
        parser.add_argument(f'--{name}-epochs' if name != 'epochs' else '--epochs', type=int, default=0)
    parser.add_argument('--warmup-prefix', action='store_true')
    parsed = parser.parse_args(['--epochs', '5', *words])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    kwargs = scheduler_kwargs(argparse.Namespace(**vars(parsed), sched='cosine', min_lr=0., warmup_lr=0.))
    assert arguments.scheduled_epochs(parsed) == create_scheduler_v2(optimizer, **kwargs)[1] == epochs


@pytest.mark.parametrize('spec', ['hf-hub:org/net', 'hf_hub:org/net'])
def test_a_resumed_run_stays_with_the_commit_that_it_began_with(tmp_path, spec):
    path, pinned = tmp_path / 'last.pth.tar', 'hf-hub:org/net@' + '0123456789' * 4
    state = {'version': 1, 'config': {'teacher': pinned}, 'epoch': 0, 'teacher_given': spec}
    torch.save({'task_state': {'aikd': state}}, path)
    args = argparse.Namespace(resume=str(path))
    assert arguments.resumed_specs(args, (spec,)) == (pinned,)
    assert arguments.resumed_specs(args, ('hf-hub:org/other',)) == ('hf-hub:org/other',)
    assert arguments.resumed_specs(argparse.Namespace(resume=''), (spec,)) == (spec,)
