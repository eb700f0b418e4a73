"""Runs of a training script that a test can hold at a chosen point and kill; they write down their own state.

`python -m tests.support.killable` imports everything and forks itself for each run that its standard input names, so
that a start costs no import. A run reseeds itself by the number of the epoch, so that a resumed run is bit for bit the
one that was never killed.
"""
import builtins
import hashlib
import io
import json
import os
import random
import signal
import sys
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import CheckpointSaver
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from timm_aikd.memory import table, table_file
from timm_aikd.memory.indices import loader_stages
from timm_aikd.memory.table import HostTable
from timm_aikd.run import AikdRun
from timm_aikd.script.launch import run_script


def main() -> None:
    """Each line on standard input is a run; answered with its process ids, and when all have ended their exit codes."""
    for line in sys.stdin:
        told = json.loads(line)
        processes = []
        for environment in told['environments']:
            process = os.fork()
            if process == 0:
                become(told, environment)
                return
            processes.append(process)
        print(json.dumps(processes), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), flush=True)


def become(told: dict, environment: dict[str, str]) -> None:
    """The run, or one rank of it, in a session of its own; `torchrun` ranks are forked by torchrun's agent."""
    os.setsid()
    log = os.open(told['journal'] + '.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(environment)
    if told['torchrun']:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=told['torchrun'], run_id=str(uuid.uuid4()), rdzv_backend='c10d',
            rdzv_endpoint='localhost:0', max_restarts=0, monitor_interval=0.1, start_method='fork')
        elastic_launch(config, train)(told)
    else:
        train(told)


def train(told: dict) -> None:
    """The script's main, with the moments at which a rank may be held."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's
    Journal(told['journal'], int(os.environ.get('RANK', 0)))
    moment, _, visits = told['held'].partition(':')
    if moment and int(os.environ.get('RANK', 0)) == 0:
        Holder(moment, int(visits), Path(told['journal'] + '-held'))
    dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=told['timeout']))
    run_script(told['words'][0], told['words'][1:])


class Journal:
    """A line at the beginning and the end of each epoch: alpha, and digests of the student and of all AI-KD's state."""

    def __init__(self, path: str, rank: int):
        self.path, self.rank = f'{path}-{rank}', rank
        begin_epoch, end_epoch = AikdRun.begin_epoch, AikdRun.end_epoch

        def begin(run, epoch, loader, *args, **kwargs):
            begin_epoch(run, epoch, loader, *args, **kwargs)
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(2 * epoch + rank)
            # whose own seed is another random number of the first epoch of a process than of the later ones
            loader_stages(loader)[-1].sampler.generator = torch.Generator().manual_seed(epoch)
            self.note('begin', run)

        def end(run):
            metrics = end_epoch(run)
            self.note('end', run)
            return metrics

        AikdRun.begin_epoch, AikdRun.end_epoch = begin, end

    def note(self, what: str, run: AikdRun) -> None:
        aikd, disc = run.aikd, run.aikd.discriminator.get_state()
        state = {
            'student': run.student.state_dict(), 'disc': disc['weights'], 'optimizer': disc['optimizer']['state'],
            'generator': disc['generator'], 'teacher': aikd.teaching.fit,
            'memory': aikd.memory.table.records.tobytes()}
        digests = {name: digest(value) for name, value in state.items()}
        line = {'what': what, 'epoch': aikd.epoch, 'alpha': aikd.progressive.alpha, **digests}
        with open(self.path, 'a') as file:
            file.write(json.dumps(line) + '\n')


def digest(value) -> str:
    return hashlib.sha256(b'|'.join(_parts(value))).hexdigest()


def _parts(value):
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, torch.Tensor):
        yield value.detach().numpy().tobytes()
    else:
        yield value if isinstance(value, bytes) else repr(value).encode()


class Holder:
    """Stops at a moment, says so with a file, and waits to be killed."""

    def __init__(self, moment: str, visits: int, file: Path):
        self.moment, self.visits, self.file = moment, visits, file
        table_file.CHUNK_BYTES = 6 * 18  # the table has six chunks
        table_file.open = partial(builtins.open, buffering=0)
        self._halfway('save_table', 'memory')
        self._halfway('load_table', 'load')
        self._before(HostTable, '_map', lambda *_: 'scratch')
        self._before(os, 'replace', lambda _, path: 'rename' if str(path).endswith('.safetensors') else 'last')
        self._before(CheckpointSaver, 'save_checkpoint', lambda *_: 'between')
        if moment == 'checkpoint':
            torch.save = partial(self._save, torch.save)

    def here(self, moment: str) -> None:
        self.visits -= moment == self.moment
        if moment == self.moment and self.visits == 0:
            self.file.touch()
            signal.pause()

    def _before(self, owner, name: str, moment_of) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            self.here(moment_of(*args))
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    def _halfway(self, name: str, moment: str) -> None:
        function, chunks = getattr(table, name), table_file.chunks

        def stopping(records):
            for number, part in enumerate(chunks(records)):
                if number == 3:
                    self.here(moment)
                yield part

        def watched(*args):
            table_file.chunks = stopping
            try:
                return function(*args)
            finally:
                table_file.chunks = chunks

        setattr(table, name, watched)

    def _save(self, save, content, path) -> None:
        save(content, buffer := io.BytesIO())
        half = buffer.tell() // 2
        with open(path, 'wb', buffering=0) as file:
            file.write(buffer.getvalue()[:half])
            self.here('checkpoint')
            file.write(buffer.getvalue()[half:])


if __name__ == '__main__':
    main()
