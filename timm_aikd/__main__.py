"""The console script `timm-aikd`, and `python -m timm_aikd train.py ...`."""
import argparse
import importlib
import os
import sys

from . import __version__
from .errors import AikdError, one_line, with_flags
from .script.launch import run_script

USAGE = """usage: timm-aikd COMMAND ...

AI-KD self-knowledge distillation for timm.

  run SCRIPT [ARGUMENT ...]      run a timm training script with AI-KD's options available
  evaluate MODEL [MODEL ...] DATA
                                 accuracy and calibration of models on a data set, side by side
  push RUN_DIR [ORG/NAME]        publish a finished run on the Hugging Face Hub, or write its folder

`timm-aikd COMMAND --help` explains a command. `python -m timm_aikd` is the same as `timm-aikd`, and where SCRIPT is the
path of a file, `run` may be left out: python -m timm_aikd train.py --aikd --aikd-teacher hf-hub:ORG/NAME ...
"""
RUN_USAGE = """usage: timm-aikd run SCRIPT [ARGUMENT ...]

Run a timm training script (train.py) as Python does, with AI-KD's options available:

  timm-aikd run train.py --data-dir DATA --model resnet50 --aikd --aikd-teacher hf-hub:timm/resnet50.a1_in1k

Plain `python train.py --aikd ...` does the same unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 or TIMM_AIKD_AUTOLOAD=0 is set.
`timm-aikd run train.py --help` lists the options of both, AI-KD's in a group of their own.
"""
FLAGS = {'teacher_model': '--model-name'}  # of the commands, for what the library calls otherwise


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    _show_help(USAGE, arguments)
    command, *rest = arguments
    if command == '--version':
        print(f'timm-aikd {__version__}')
    elif command in ('evaluate', 'push'):
        _do(command, rest)
    elif command == 'run':
        _show_help(RUN_USAGE, rest)
        _run(*rest)
    elif os.path.exists(command):
        _run(*arguments)
    else:
        sys.exit(f'timm-aikd: {command} is neither a command (run, evaluate, push) nor the path of a script')


def _show_help(usage: str, arguments: list[str]) -> None:
    """End with the usage, where it is asked for or there is nothing to do."""
    if not arguments or arguments[0] in ('-h', '--help'):
        print(usage, end='')
        sys.exit(0 if arguments else 2)


def _run(path: str, *arguments: str) -> None:
    try:
        open(path, 'rb').close()
    except OSError as error:
        sys.exit(f'timm-aikd: {AikdError(f"cannot read {path}: {error.strerror}; give the path of a script")}')
    run_script(path, list(arguments))


def _do(command: str, arguments: list[str]) -> None:
    """Run the module of that name in `commands`: its `add_arguments`, and its function of the same name."""
    module = importlib.import_module(f'.commands.{command}', __package__)
    parser = argparse.ArgumentParser(
        prog=f'timm-aikd {command}', description=module.DESCRIPTION, epilog=f'example: {module.EXAMPLE}')
    module.add_arguments(parser)
    parser.add_argument(
        '--import', action='append', default=[], dest='imports', metavar='MODULE',
        help='Python module to import first, which registers models of your own; may be given again')
    args = parser.parse_args(arguments)
    try:
        _import(args.imports)
        getattr(module, command)(args)
    except AikdError as error:
        if os.environ.get('TIMM_AIKD_TRACEBACK') == '1':
            raise
        sys.exit(f'error: {with_flags(str(error), FLAGS)}')


def _import(names: list[str]) -> None:
    if names:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, and a console script does not
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # of the user's code
            raise AikdError(
                f'--import {name}: cannot be imported ({type(error).__name__}: {one_line(error)}): name a module of '
                f'this folder or of an installed package, such as my_models for my_models.py') from error


if __name__ == '__main__':
    main()
