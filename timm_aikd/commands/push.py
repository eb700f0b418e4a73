"""A finished run -> a model folder for the Hugging Face Hub, with its card: `timm-aikd push`."""
import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub import errors as hub
from timm.models import create_model, save_for_hf

from .. import __version__
from ..errors import AikdError, one_line
from ..teacher import TimmModel
from .finished_run import BEST, FinishedRun
from .model_card import model_card

DESCRIPTION = (
    'Publish the best model of a finished run: its weights (safetensors), its timm config with class names and '
    'normalisation, and a model card with results, recipe, teacher and curves. The folder is loaded again and compared '
    'before anything is uploaded. Log in before with `hf auth login` or HF_TOKEN.')
EXAMPLE = 'timm-aikd push out/phase2 me/resnet50-flowers --license apache-2.0'
# of other weights of the same architecture, and test sizes that were never tried with these
FOREIGN = (
    'tag', 'license', 'origin_url', 'paper_ids', 'paper_name', 'description', 'notes', 'label_names',
    'label_descriptions', 'label_offset', 'test_input_size', 'test_crop_pct', 'custom_load')
_REPOSITORY = re.compile(r'(hf-hub:)?(\w[\w.-]*/\w[\w.-]*)')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own command line."""
    add = parser.add_argument
    add('run_dir', metavar='RUN_DIR', help='output folder of a run of timm\'s train.py, or a checkpoint in it')
    add('repository', nargs='?', metavar='ORG/NAME', help='model repository on the Hub, made if needed')
    add('--to-folder', metavar='PATH', help='write the model here, and upload nothing')
    add('--checkpoint', metavar='NAME', help=f'file in RUN_DIR ({BEST})')
    add('--model-name', metavar='NAME', help='architecture (the one stored in the checkpoint)')
    add('--class-map', metavar='FILE',
        help='class names, one a line, in the order of the outputs (those that a run with --aikd has kept)')
    add('--dataset-name', metavar='NAME', help='what the card calls the data set (--dataset or the folder of the run)')
    add('--temperature', type=float, metavar='T', help='temperature that `timm-aikd evaluate --calibrate` printed: '
        'config.json keeps it, and the code in the card divides the logits by it (none)')
    add('--license', metavar='ID', help='as the Hub calls it, such as apache-2.0 (none)')
    add('--private', action='store_true', help='make the repository a private one')


def push(args: argparse.Namespace) -> None:
    """Write the model's folder, and upload it unless `--to-folder` is given.

    Raises:
        AikdError: A bad argument, a run without a usable checkpoint, or a Hub that does not take it.
    """
    repository, target = _repository(args.repository), _target(args.to_folder)
    if repository is None and target is None:
        raise AikdError('push: where to? give ORG/NAME, or --to-folder PATH to upload nothing')
    _check_temperature(args.temperature)
    run = _read_run(args)
    with _scratch(target) as scratch:
        folder = scratch / 'model'
        folder.mkdir()
        write_model_folder(run, folder, repository, args.license, args.temperature)
        files = ', '.join(sorted(file.name for file in folder.iterdir()))
        if target:
            place, spec = _moved(folder, target), f'local-dir:{target}'
        elif repository:
            place, spec = _upload(folder, repository, args.private), f'hf-hub:{repository}'
    print(f'{place}: {files}\nload it with timm.create_model(\'{spec}\', pretrained=True)')


@contextmanager
def _scratch(target: Path | None) -> Iterator[Path]:
    """A folder for temporary files on the target's disk.

    Raises:
        AikdError: Something cannot be written there.
    """
    parent = target.absolute().parent if target else None
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix='.timm-aikd-') as folder:
            yield Path(folder)
    except OSError as error:
        raise AikdError(
            f'push: cannot write to {error.filename or parent or "the folder for temporary files"} '
            f'({error.strerror or error}): name another folder, with room') from error


def _check_temperature(temperature: float | None) -> None:
    if temperature is not None and not 0 < temperature < float('inf'):
        raise AikdError(f'--temperature {temperature}: allowed is a number > 0, as evaluate --calibrate prints it')


def _moved(folder: Path, target: Path) -> str:
    """Move a folder to a place that is free or an empty folder."""
    if os.path.exists(target):
        target.rmdir()
    return str(shutil.move(folder, target))


def write_model_folder(
        run: FinishedRun,
        folder: Path,
        repository: str | None,
        license: str | None = None,
        temperature: float | None = None,
) -> None:
    """Weights, config, card and pictures into an existing folder; checked by loading them again.

    The other arguments are those of `model_card`; the temperature also goes into config.json.

    Raises:
        AikdError: timm does not give the same model back.
    """
    config = {key: value for key, value in run.model.pretrained_cfg.items() if key not in FOREIGN}
    kept = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    config.update({key: run.data_config[key] for key in kept if key in run.data_config})
    run.model.pretrained_cfg = {**config, 'num_classes': run.model.num_classes}
    extra = {'label_names': run.class_names, 'temperature': temperature}
    save_for_hf(
        run.model, str(folder), model_args=run.model_args, safe_serialization=True,
        model_config={key: value for key, value in extra.items() if value})
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')  # safetensors writes files of mode 0600
    _check_reload(run.model, folder)
    card = model_card(run, repository, license, temperature, _draw(run, folder))
    (folder / 'README.md').write_text(card, encoding='utf-8')


@torch.inference_mode()
def _check_reload(model: TimmModel, folder: Path) -> None:
    """Nobody should download a model that does not load, or whose outputs differ."""
    input = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        again = create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:
        raise AikdError(
            f'push: timm {timm.__version__} cannot load this model again ({one_line(error)}): a newer timm may'
        ) from error
    expected = model.eval()(input)
    if not expected.isfinite().all():
        raise AikdError('push: the model\'s outputs are not finite: the run diverged, choose another --checkpoint')
    if not torch.equal(again.eval()(input), expected):
        raise AikdError(
            f'push: the model that timm {timm.__version__} builds from the folder gives other outputs than the run\'s: '
            f'a newer timm may keep all of its arguments')


def _draw(run: FinishedRun, folder: Path) -> list[str]:
    from .plots import training_curves

    try:
        return ['curves.png'] if training_curves(folder / 'curves.png', run.epochs) else []
    except AikdError as error:
        print(f'note: the card has no pictures: {error}')
        return []


def _repository(given: str | None) -> str | None:
    if given is None:
        return None
    match = _REPOSITORY.fullmatch(given)
    if match is None or '..' in given or '--' in given:
        raise AikdError(f'push: {given} is no repository of the Hub: write ORG/NAME')
    return match[2]


def _target(given: str | None) -> Path | None:
    target = Path(given) if given else None
    if target and os.path.exists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise AikdError(f'--to-folder {target}: is there already: name a new or an empty folder')
    return target


def _read_run(args: argparse.Namespace) -> FinishedRun:
    run = FinishedRun.read(args.run_dir, args.checkpoint, args.model_name)
    names = run.class_names if args.class_map is None else _read_names(args.class_map, run.model.num_classes)
    if names is None:
        print('note: the run does not tell its class names, and neither will the model: --class-map gives them')
    return replace(run, class_names=names, data_set=args.dataset_name or run.data_set)


def _read_names(path: str, classes: int) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AikdError(f'--class-map {path}: cannot be read as text, one name a line: check the file') from error
    if len(names) != classes or len(set(names)) != classes:
        raise AikdError(
            f'--class-map {path}: has {len(names)} names ({len(set(names))} different), the model has {classes} '
            f'classes: one name a line in the order of the outputs')
    return names


def _upload(folder: Path, repository: str, private: bool) -> str:
    api = HfApi(library_name='timm-aikd', library_version=__version__)
    try:
        if api.repo_exists(repository):
            if private and not api.repo_info(repository).private:
                raise AikdError(
                    f'--private: {repository} exists and is public: change that on the Hub, or leave it out')
            print(f'note: {repository} exists: its README.md, config.json and model.safetensors are replaced')
        api.create_repo(repository, private=private, exist_ok=True)
        # all files in one commit: nobody sees weights without their config
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message='Add model')
    except AikdError:
        raise
    except Exception as error:  # of the client, the network, or the Hub's answer
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        raise AikdError(
            f'push {repository}: the Hub did not take it ({type(error).__name__}'
            f'{f", {status}" if status else ""}): {_remedy(error, status, repository)}') from error
    return str(commit.commit_url).partition('/commit/')[0]


def _remedy(error: Exception, status: int | None, repository: str) -> str:
    if isinstance(error, hub.LocalTokenNotFoundError) or status == 401:
        return 'log in with `hf auth login` or HF_TOKEN'
    if status == 403:
        return f'this token must not write to {repository.partition("/")[0]}: use one that may'
    if isinstance(error, hub.OfflineModeIsEnabled):
        return 'unset HF_HUB_OFFLINE'
    return 'check the network and HF_ENDPOINT and try again, or write it --to-folder'
