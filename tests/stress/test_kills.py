"""Whole runs, of one rank and of two under torchrun, are killed and resumed, and are what they would have been."""
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import timm
import torch

from ..conftest import ROOT, training_scripts
from ..script.test_scripts import aikd, command

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks for processes in /proc')]

EPOCHS, KILLS, PATIENCE = 27, 10, 300  # too few for a teacher of random weights to be found out
HELD = ('scratch', 'memory', 'rename', 'between', 'checkpoint', 'last')  # see killable.Holder


class Job:
    """The runs of one output folder, one after the other."""

    def __init__(self, server, folder, images, teacher, ranks):
        self.server, self.folder, self.output, self.ranks = server, folder, folder / 'student', ranks
        self.starts, self.sessions, self.running = 0, [], False
        self.scratch = folder / 'scratch'
        self.scratch.mkdir()
        script = training_scripts()['newest' if ranks == 2 else 'examples'] or training_scripts()['examples']
        self.words = command(
            script, images, folder, 'student', *aikd(teacher), '--aikd-memory', 'store', '--aikd-memory-dir',
            self.scratch, '--aikd-teacher-dtype', 'float32', '--epochs', EPOCHS, '--checkpoint-hist', EPOCHS,
            *(('-b', '3') if ranks == 2 else ()))

    def start(self, held='', by_hand=(), timeout=PATIENCE):
        """Start, or continue from the newest whole checkpoint; process ids: of the agent, or of each rank by hand."""
        self.starts += 1
        self.journal, self.resumed = self.folder / f'journal{self.starts}', self.checkpoint()
        words = [*self.words, *(('--resume', self.resumed) if self.resumed else ())]
        print(json.dumps({
            'journal': str(self.journal), 'held': held, 'words': list(map(str, words)),
            'torchrun': 0 if by_hand or self.ranks == 1 else self.ranks, 'environments': by_hand or [{}],
            'timeout': timeout,
        }), file=self.server.stdin, flush=True)
        started = json.loads(self.server.stdout.readline())
        self.sessions += started
        self.running = True
        return started

    def wait(self):
        """Exit codes."""
        self.running = False
        return json.loads(self.server.stdout.readline())

    def checkpoint(self):
        if (self.output / 'last.pth.tar').exists():
            return self.output / 'last.pth.tar'
        numbered = self.output.glob('checkpoint-*.pth.tar')
        return max(numbered, key=lambda path: int(path.name.split('-')[1].split('.')[0]), default=None)

    def lines(self, rank=0, start=None):
        path = self.folder / f'journal{start or self.starts}-{rank}'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self):
        return Path(f'{self.journal}.log').read_text()

    def processes(self):
        """Ids of all processes of this job that are alive, orphans and loader processes among them."""
        found = []
        for path in Path('/proc').glob('[0-9]*'):
            try:
                state, _, _, session = (path / 'stat').read_text().rpartition(')')[2].split()[:4]
            except OSError:  # gone
                continue
            if int(session) in self.sessions and state != 'Z':
                found.append(int(path.name))
        return found

    def end(self):
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        if self.running:
            self.wait()

    def until(self, condition, alive=True):
        """Wait for something that the run does."""
        deadline = time.monotonic() + PATIENCE
        for polls in itertools.count():
            if condition():
                return
            time.sleep(0.01)
            if polls % 100 == 0:
                assert time.monotonic() < deadline and (self.processes() or not alive), self.log()[-4000:]


@pytest.fixture(scope='module')
def job(image_folder, tmp_path_factory):
    """Makes jobs, and lets no process of theirs live on."""
    server = subprocess.Popen(
        [sys.executable, '-m', 'tests.support.killable'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'GLOO_SOCKET_IFNAME': 'lo'})
    teacher, jobs = tmp_path_factory.mktemp('teacher') / 'teacher.pth', []
    torch.manual_seed(1)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), teacher)

    def make(ranks):
        for each in jobs:  # of a test that failed
            each.end()
        jobs.append(Job(server, tmp_path_factory.mktemp('job'), image_folder, teacher, ranks))
        return jobs[-1]

    yield make
    for each in jobs:
        each.end()
    server.stdin.close()
    server.stdout.close()
    server.wait(PATIENCE)


@pytest.fixture(scope='module')
def never_killed(job):
    """What each rank of a run that was never killed has noted, and its last memory file."""
    @cache
    def noted(ranks):
        whole = job(ranks)
        whole.start()
        assert whole.wait() == [0], whole.log()[-4000:]
        lines = [{(line['what'], line['epoch']): line for line in whole.lines(rank)} for rank in range(ranks)]
        assert all(len(each) == 2 * EPOCHS for each in lines)
        return lines, (whole.output / f'aikd-memory-{EPOCHS - 1}.safetensors').read_bytes()
    return noted


@pytest.mark.parametrize('kind', [signal.SIGKILL, signal.SIGTERM], ids=lambda kind: kind.name)
@pytest.mark.parametrize('ranks', [1, 2])
def test_killed_at_any_moment(job, never_killed, ranks, kind):
    """Ten times, half of them in or beside a write. SIGKILL takes all ranks at once, torchrun hands SIGTERM to them.

    D, its optimizer, T_c, the memory, alpha and the student are those of the run never killed, on each rank and from
    the first epoch after each resume on; no process and no file is left behind.
    """
    chance = random.Random(f'{ranks} {kind.name}')
    moments = [*chance.sample(HELD, 4), *[''] * (KILLS - 5)]
    chance.shuffle(moments)
    moments.append('load')  # there is something to load by now
    killed = job(ranks)
    for moment in moments:
        visits = 1 if moment in ('load', 'scratch') else chance.choice((1, 2))
        victims = killed.start(moment and f'{moment}:{visits}')
        if moment:
            killed.until(Path(f'{killed.journal}-held').exists)
        else:
            killed.until(lambda lines=2 * visits - 1: len(killed.lines()) >= lines)
            time.sleep(chance.uniform(0, 0.3))
        assert killed.processes()
        if killed.lines():
            assert list(killed.scratch.iterdir()) == []
            if killed.resumed is not None:
                epoch = killed.lines()[0]['epoch'] - 1
                assert f'prediction memory of epoch {epoch} restored, 36 samples' in killed.log()
        in_the_middle_of = {'scratch': killed.scratch.glob('*'), 'memory': killed.output.glob('*.tmp'),
                            'rename': killed.output.glob('*.tmp'), 'checkpoint': killed.output.glob('tmp.pth.tar')}
        assert len(list(in_the_middle_of.get(moment, 'x'))) == 1
        for victim in killed.processes() if kind == signal.SIGKILL and ranks == 2 else victims:
            os.kill(victim, kind)
        assert killed.wait() != [0]
    killed.start()
    assert killed.wait() == [0], killed.log()[-4000:]
    killed.until(lambda: not killed.processes(), alive=False)
    noted, memory = never_killed(ranks)
    compared = 0
    for start in range(1, killed.starts + 1):
        for rank in range(ranks):
            for line in killed.lines(rank, start):
                assert line == noted[rank][line['what'], line['epoch']], (start, rank)
                compared += 1
    assert compared >= 2 * ranks * EPOCHS and killed.starts == KILLS + 1
    assert list(killed.scratch.iterdir()) == []
    files = {path.name for path in killed.output.glob('aikd-memory-*')}
    assert files == {f'aikd-memory-{epoch}.safetensors' for epoch in range(EPOCHS)}  # all checkpoints are kept
    assert (killed.output / f'aikd-memory-{EPOCHS - 1}.safetensors').read_bytes() == memory


@pytest.mark.parametrize('how, victim', [('killed', 0), ('killed', 1), ('stopped', 1), ('killed under torchrun', 1)])
def test_a_rank_that_goes_alone(job, how, victim):
    """The others end with an error, at once or within the time-out of the process group, and nothing is left."""
    alone, by_hand = job(2), ()
    if 'torchrun' not in how:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        by_hand = [{'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
                    'MASTER_PORT': port} for rank in '01']
    started = alone.start(by_hand=by_hand, timeout=20)
    alone.until(lambda: min(len(alone.lines(rank)) for rank in range(2)) >= 3)
    time.sleep(random.Random(how).uniform(0, 0.3))
    gone = started[victim] if by_hand else ranks_of(started[0])[victim]
    os.kill(gone, signal.SIGSTOP if how == 'stopped' else signal.SIGKILL)
    if how == 'stopped':
        survivor, began = started[1 - victim], time.monotonic()
        alone.until(lambda: survivor not in alone.processes())
        assert time.monotonic() - began < 60
        os.kill(gone, signal.SIGKILL)
    codes = alone.wait()
    assert codes == [1] if not by_hand else codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    assert 'Error: ' in alone.log() or 'SIGKILL' in alone.log(), alone.log()[-4000:]
    alone.until(lambda: not alone.processes(), alive=False)
    assert list(alone.scratch.iterdir()) == []
    assert torch.load(alone.checkpoint(), weights_only=False)['task_state']['aikd']['memory'] is not None


def ranks_of(agent):
    """Ids of the processes that torchrun's agent has started, in order of rank."""
    children = Path(f'/proc/{agent}/task/{agent}/children').read_text().split()
    return sorted(map(int, children))
