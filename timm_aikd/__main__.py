"""The console script `timm-aikd`, and `python -m timm_aikd train.py ...`."""
import argparse
import os
import sys
from collections.abc import Callable

from . import AikdError, __version__
from .launch import run_script

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


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ('-h', '--help'):
        print(USAGE, end='')
        sys.exit(0 if arguments else 2)
    command, *rest = arguments
    if command == '--version':
        print(f'timm-aikd {__version__}')
    elif command == 'evaluate':
        _evaluate(rest)
    elif command == 'push':
        _push(rest)
    elif command == 'run':
        if not rest or rest[0] in ('-h', '--help'):
            print(RUN_USAGE, end='')
            sys.exit(0 if rest else 2)
        _run(*rest)
    elif os.path.exists(command):
        _run(*arguments)
    else:
        sys.exit(f'timm-aikd: {command} is neither a command (run, evaluate, push) nor the path of a script')


def _run(path: str, *arguments: str) -> None:
    try:
        open(path, 'rb').close()
    except OSError as error:
        sys.exit(f'timm-aikd: {AikdError(f"cannot read {path}: {error.strerror}; give the path of a script")}')
    run_script(path, list(arguments))


def _evaluate(arguments: list[str]) -> None:
    from . import evaluate

    _do(evaluate.evaluate, evaluate.add_arguments, arguments, argparse.ArgumentParser(
        prog='timm-aikd evaluate',
        description='Top-1, top-5, negative log-likelihood (NLL), expected calibration error (ECE) and area under the '
        'risk-coverage curve (AURC) of models on a labelled data set: one row each, and their reliability diagrams. A '
        'model is fed as it was trained or recommends; its classes are matched with those of the data by name.',
        epilog='example: timm-aikd evaluate out/phase1 out/phase2 hf-hub:timm/resnet50.a1_in1k DATA'))


def _push(arguments: list[str]) -> None:
    from . import publish

    _do(publish.push, publish.add_arguments, arguments, argparse.ArgumentParser(
        prog='timm-aikd push',
        description='Publish the best model of a finished run: its weights (safetensors), its timm config with class '
        'names and normalisation, and a model card with results, recipe, teacher and curves. What is written is loaded '
        'again and compared before anything is uploaded. Log in before with `hf auth login` or HF_TOKEN.',
        epilog='example: timm-aikd push out/phase2 me/resnet50-flowers --license apache-2.0'))


def _do(
        command: Callable[[argparse.Namespace], None],
        add_arguments: Callable[[argparse.ArgumentParser], None],
        arguments: list[str],
        parser: argparse.ArgumentParser,
) -> None:
    add_arguments(parser)
    try:
        command(parser.parse_args(arguments))
    except AikdError as error:
        if os.environ.get('TIMM_AIKD_TRACEBACK') == '1':
            raise
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
