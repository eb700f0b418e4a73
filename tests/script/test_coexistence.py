"""Other people's tools around a training under AI-KD: all of them end with the student of a run without them."""
import textwrap

import pytest
import torch

from ..conftest import run
from .test_scripts import aikd, checkpoint, command, phase1  # noqa: F401


@pytest.fixture
def words(train_script, image_folder, phase1, tmp_path):  # noqa: F811
    """The command line of a run of that name, under AI-KD or plain."""
    def make(name, plain=False):
        made = command(train_script, image_folder, tmp_path, name, '-j', '0', *([] if plain else aikd(phase1)))
        return list(map(str, made))
    return make


@pytest.fixture
def same_student(words, tmp_path):
    """Whether runs of these names had the student of an undisturbed run, of the same kind."""
    def compare(*names, plain=False):
        run(*words('alone', plain))
        alone = checkpoint(tmp_path / 'alone')
        for name in names:
            other = checkpoint(tmp_path / name)
            assert other['epoch'] == alone['epoch'] and ('aikd' in other.get('task_state', {})) is not plain
            assert all(torch.equal(weight, other['state_dict'][key]) for key, weight in alone['state_dict'].items())
    return compare


DEBUGGER = '''
import io, pdb, runpy, sys
sys.argv = sys.argv[1:]
debugger = pdb.Pdb(stdin=io.StringIO('step\\ncontinue\\n'), stdout=sys.stdout, nosigint=True, readrc=False)
debugger.runcall(runpy.run_path, sys.argv[0], run_name='__main__')
'''


@pytest.mark.parametrize('tool', [
    ['-m', 'coverage', 'run', '--data-file', 'FOLDER/coverage'],
    ['-m', 'cProfile', '-o', 'FOLDER/profile'],
    ['-c', DEBUGGER],
    ['-m', 'IPython', '--no-banner', '--ipython-dir', 'FOLDER', '-c', '%run SCRIPT'],
    ['-m', 'timm_aikd'],
], ids=['coverage', 'cProfile', 'pdb', 'IPython', 'timm_aikd'])
def test_a_tool_that_runs_the_script(words, same_student, tmp_path, tool):
    script, *rest = words('tool')
    if 'IPython' in tool:  # as a cell of a notebook does
        tool, after = [word.replace('SCRIPT', ' '.join([script, *rest])) for word in tool], []
    else:
        after = [script, *rest]
    run(*(word.replace('FOLDER', str(tmp_path)) for word in tool), *after)
    same_student('tool')


PLUGIN = '''
import argparse
def load():
    import timm
    argparse.ArgumentParser().parse_known_args([])
    inner = argparse.ArgumentParser.parse_known_args
    def outer(self, *args, **kwargs):
        print('{name} sees a parse')
        return inner(self, *args, **kwargs)
    argparse.ArgumentParser.parse_known_args = outer
'''


def test_other_plugins_of_torch(words, same_student, tmp_path):
    """One before ours and one after it, which import timm, parse, and wrap argparse as well."""
    for name, folder in (('first', tmp_path / 'before'), ('second', tmp_path / 'after')):
        info = folder / f'{name}-1.0.dist-info'
        info.mkdir(parents=True)
        (folder / f'{name}_plugin.py').write_text(PLUGIN.replace('{name}', name))
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text(f'[torch.backends]\n{name} = {name}_plugin:load\n')
    # The order of the entry points is that of sys.path; the package itself lies in between.
    script, *rest = words('plugins')
    code = (f'import sys; sys.path[:0] = [{str(tmp_path / "before")!r}]; sys.path.append({str(tmp_path / "after")!r}); '
            f'import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
    done = run('-c', code, script, *rest)
    assert 'first sees a parse' in done.stdout and 'second sees a parse' in done.stdout
    same_student('plugins')


def test_pytest_imports_the_script_and_calls_main_again_and_again(words, same_student, train_script, tmp_path):
    (tmp_path / 'test_train.py').write_text(textwrap.dedent(f'''
        import sys
        import pytest
        sys.path.insert(0, {str(train_script.parent)!r})
        import train

        @pytest.mark.parametrize('words', {[words('one'), words('plain', plain=True), words('two')]})
        def test_main(monkeypatch, words):
            monkeypatch.setattr(sys, 'argv', words)
            assert train.parser and train.config_parser
            train.main()
    '''))
    run('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', tmp_path, tmp_path / 'test_train.py')
    same_student('one', 'two')
    same_student('plain', plain=True)


def test_several_scripts_in_one_process(words, same_student, train_script, tmp_path):
    """Both are imported before either is run; each keeps its own state."""
    (tmp_path / 'driver.py').write_text(textwrap.dedent(f'''
        import importlib.util, sys

        def load(name):
            spec = importlib.util.spec_from_file_location(name, {str(train_script)!r})
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module

        first, second = load('first'), load('second')
        for script, sys.argv in ((first, {words('one')}), (second, {words('two')}), (first, {words('three')})):
            script.main()
    '''))
    run(tmp_path / 'driver.py')
    same_student('one', 'two', 'three')


def test_a_driver_of_subprocesses(words, same_student, tmp_path):
    """It has loaded torch and has options of timm's names of its own, and of ours."""
    (tmp_path / 'sweep.py').write_text(textwrap.dedent(f'''
        import argparse, multiprocessing, runpy, subprocess, sys
        import torch

        def train(words):
            sys.argv = words
            runpy.run_path(words[0], run_name='__main__')

        if __name__ == '__main__':
            parser = argparse.ArgumentParser()
            parser.add_argument('--model')
            parser.add_argument('--epochs', type=int)
            parser.add_argument('--aikd', action='store_true')
            args, rest = parser.parse_known_args()
            assert args.aikd and rest == ['--aikd-alpha', '0.5']
            subprocess.run([sys.executable, *{words('child')}], check=True)
            process = multiprocessing.get_context('spawn').Process(target=train, args=({words('spawned')},))
            process.start()
            process.join()
            sys.exit(process.exitcode)
    '''))
    run(tmp_path / 'sweep.py', '--model', 'x', '--aikd', '--aikd-alpha', '0.5')
    same_student('child', 'spawned')


def test_a_failed_run_does_not_end_a_notebook(words, tmp_path):
    """The script's own error is shown, the session goes on and ends as it would have."""
    script, *rest = words('failed')
    rest[rest.index('--model') + 1] = 'test_of_nobody'
    done = run('-m', 'IPython', '--no-banner', '--ipython-dir', tmp_path, '-c', textwrap.dedent(f'''
        import atexit
        atexit.register(print, 'the session ended')
        %run {" ".join([script, *rest])}
        print('the next cell')
    '''), check=False)
    assert 'test_of_nobody' in done.stdout + done.stderr
    assert 'the next cell' in done.stdout and 'the session ended' in done.stdout and 'no AI-KD step' not in done.stderr
