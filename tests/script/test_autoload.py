"""The entry point: what it may touch, what it costs, and that nothing of ours can break `import torch`."""
import argparse
import importlib.metadata
import sys
import types
from pathlib import Path

import pytest

from timm_aikd.script import autoload, options

from ..conftest import run, unwatch_parsers


def training_parser() -> argparse.ArgumentParser:
    """A parser with the options by which a timm training script is known."""
    parser = argparse.ArgumentParser(prog='train.py')
    for name in sorted(autoload.SIGNATURE):
        parser.add_argument('--' + name.replace('_', '-'))
    return parser


@pytest.fixture
def armed():
    """The wrapper on, as after `import torch`; argparse is put back whatever the test does."""
    autoload.arm()
    yield
    unwatch_parsers()


def in_script(source: str, **names) -> dict:
    """Run source as a module of its own, with its own globals."""
    module = types.ModuleType('script')
    module.__dict__.update(names)
    exec(source, module.__dict__)
    return module.__dict__


def test_is_a_torch_backends_entry_point():
    entry, = (e for e in importlib.metadata.entry_points(group='torch.backends') if e.name == 'timm_aikd')
    assert entry.value == 'timm_aikd.script.autoload:arm' and entry.load() is autoload.arm


def test_adds_the_options_at_the_first_parse(armed):
    config_parser = argparse.ArgumentParser()
    config_parser.add_argument('--config')
    script = in_script(
        'first, rest = config_parser.parse_known_args(["--model", "x"])\nparser.set_defaults(aikd_alpha=0.5)\n'
        'args = parser.parse_args(rest)', config_parser=config_parser, parser=training_parser())
    assert script['args'].aikd is False and script['args'].aikd_alpha == 0.5 and script['args'].model == 'x'
    assert not any(action.dest == 'aikd' for action in config_parser._actions)


def test_a_parser_made_in_a_function_is_found_too(armed):
    script = in_script('args = (lambda p: p.parse_args([]))(make())', make=training_parser)
    assert script['args'].aikd is False


def test_other_parsers_are_left_alone(armed):
    other = argparse.ArgumentParser()
    other.add_argument('--model')
    other.add_argument('--epochs')
    script = in_script('args = parser.parse_args(["--model", "x"])', parser=other)
    assert vars(script['args']) == {'model': 'x', 'epochs': None}
    assert 'parse_known_args' not in vars(other)
    with pytest.raises(SystemExit):
        in_script('parser.parse_args(["--aikd"])', parser=other)


def test_a_subclass_with_its_own_parse_is_respected(armed):
    class Parser(argparse.ArgumentParser):
        def parse_known_args(self, args=None, namespace=None):
            parsed, rest = super().parse_known_args(args, namespace)
            parsed.mark = True
            return parsed, rest

    parser = Parser()
    for action in training_parser()._actions[1:]:
        parser.add_argument('--' + action.dest.replace('_', '-'))
    script = in_script('args = parser.parse_args([])\nagain = parser.parse_args([])', parser=parser)
    assert script['args'].mark and script['again'].mark and script['args'].aikd is False


def test_parsing_twice_in_one_process(armed):
    script = in_script('a = parser.parse_args([])\nb = parser.parse_args([])', parser=training_parser())
    assert script['a'].aikd is False and script['b'].aikd is False
    assert len([action for action in script['parser']._actions if action.dest == 'aikd']) == 1


def test_arming_twice_is_harmless_and_can_be_switched_off(monkeypatch):
    unwatch_parsers()
    plain = argparse.ArgumentParser.parse_known_args
    monkeypatch.setenv('TIMM_AIKD_AUTOLOAD', '0')
    autoload.arm()
    assert argparse.ArgumentParser.parse_known_args is plain
    monkeypatch.delenv('TIMM_AIKD_AUTOLOAD')
    autoload.arm()
    autoload.arm()
    assert argparse.ArgumentParser.parse_known_args is autoload._parse_known_args
    unwatch_parsers()
    assert argparse.ArgumentParser.parse_known_args is plain


def test_a_wrapper_over_ours_survives_and_passes_through(armed, monkeypatch):
    ours = argparse.ArgumentParser.parse_known_args
    calls = []

    def theirs(self, *args, **kwargs):
        calls.append(self)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_known_args', theirs)
    script = in_script('a = parser.parse_args([])\nb = other.parse_args([])', parser=training_parser(),
                       other=argparse.ArgumentParser())
    assert script['a'].aikd is False and calls
    autoload.arm()  # again, with theirs still on top
    assert in_script('a = parser.parse_args([])', parser=training_parser())['a'].aikd is False


def test_never_raises_but_says_why_if_asked(monkeypatch, capsys):
    monkeypatch.setattr(autoload, 'watch_parsers', lambda: 1 / 0)
    autoload.arm()
    monkeypatch.undo()
    monkeypatch.setattr(autoload, '_calling_globals', lambda: 1 / 0)
    parser = argparse.ArgumentParser()
    unwatch_parsers()
    autoload.arm()
    assert parser.parse_args([]) is not None  # whatever is wrong with us, the program parses
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('TIMM_AIKD_TRACEBACK', '1')
    parser.parse_args([])
    assert 'ZeroDivisionError' in capsys.readouterr().err
    unwatch_parsers()


def test_a_failing_adoption_leaves_the_script_its_parse(armed, monkeypatch):
    monkeypatch.setattr(options, 'adopt', lambda parser, script: 1 / 0)
    script = in_script('args = parser.parse_args(["--model", "x"])', parser=training_parser())
    assert script['args'].model == 'x'


def test_a_script_with_options_of_our_names_keeps_them(armed, capsys):
    def script(*words):
        parser = training_parser()
        parser.add_argument('--aikd-alpha', type=int)
        return in_script('args = parser.parse_args(words)', parser=parser, words=words)

    assert script('--aikd-alpha', '2')['args'].aikd_alpha == 2
    with pytest.raises(SystemExit):
        script('--aikd')  # not a switch that does nothing
    assert '--aikd' in capsys.readouterr().err


def test_a_second_script_in_the_process_is_found_too(armed):
    for _ in range(2):
        script = in_script('args = parser.parse_args([])', parser=training_parser())
        assert script['args'].aikd is False


def test_a_plain_run_loads_nothing_that_needs_timm():
    code = (
        'import argparse, sys, torch; from timm_aikd.script import autoload; p = argparse.ArgumentParser(); '
        '[p.add_argument("--" + x) for x in autoload.SIGNATURE]; autoload.watch_parsers(); '
        'print(p.parse_args([]).aikd, "timm" in sys.modules)')
    assert run('-c', code).stdout == 'False False\n'


def test_imports_the_standard_library_only():
    code = (
        'import sys; before = set(sys.modules); import timm_aikd.script.autoload; '
        'print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))')
    assert run('-c', code).stdout.strip() == "['timm_aikd']"


def test_a_broken_package_does_not_break_import_torch(tmp_path):
    """Not even a module of ours that cannot do its work: an armed wrapper without the rest of the package."""
    room = tmp_path / 'timm_aikd' / 'script'
    room.mkdir(parents=True)
    for folder in (room, room.parent):
        (folder / '__init__.py').write_text('')
    (room / 'autoload.py').write_text(Path(autoload.__file__).read_text())
    code = 'import torch, argparse; p = argparse.ArgumentParser(); p.add_argument("--x"); print(p.parse_args([]).x)'
    assert run('-c', code, PYTHONPATH=str(tmp_path)).stdout == 'None\n'


def test_adopting_is_the_options_work_alone(armed, monkeypatch):
    adopt, seen = options.adopt, []
    monkeypatch.setattr(
        options, 'adopt', lambda parser, script: (seen.append((parser, script['__name__'])), adopt(parser, script)))
    parser = training_parser()
    in_script('parser.parse_args([])', parser=parser)
    assert seen == [(parser, 'script')]
    assert sys.modules['timm_aikd.script.options'] is options
