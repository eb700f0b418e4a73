"""Models of timm, of the Hub, and of folders with the files that the Hub has."""
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from ..errors import AikdError, one_line
from ..ranks import logger
from .hub import CONFIG, Unfit, check_config, fetch
from .model import LoadedModel, TimmModel, create
from .spec import TeacherSpec


def load_published(spec: TeacherSpec) -> LoadedModel:
    """The model of a spec of kind 'folder', 'hub' or 'name'.

    Raises:
        AikdError: It cannot be had, or is not of timm.
    """
    sources = {'folder': _from_folder, 'hub': _from_hub, 'name': _from_timm}
    try:
        model, name = sources[spec.kind](spec)
    except AikdError:
        raise
    except Exception as error:
        remedy = 'save it again with save_for_hf of timm' if spec.kind == 'folder' else (
            'if its files were damaged on the way, repeat `hf download` with --force-download')
        what = str(error) if isinstance(error, Unfit) else (
            f'could not be loaded as a timm model with pretrained weights ({type(error).__name__}: {one_line(error)}); '
            f'{remedy}')
        raise AikdError(f'{spec.text}: {what}') from error
    return LoadedModel(model, name, model.pretrained_cfg)


def _from_folder(spec: TeacherSpec) -> tuple[TimmModel, str]:
    check_config(Path(spec.value) / CONFIG)
    return create(f'local-dir:{spec.value}', pretrained=True), spec.text


def _from_hub(spec: TeacherSpec) -> tuple[TimmModel, str]:
    weights = fetch(spec.text, spec.value, spec.revision)
    if weights.suffix == '.bin':
        logger.info(f'AI-KD: {spec.text} has no safetensors; its pickled weights are read as tensors only')
    model = create(f'local-dir:{weights.parent}', pretrained=True, pretrained_cfg_overlay=_only(weights))
    return model, f'hf-hub:{spec.value}@{weights.parent.name}'


def _from_timm(spec: TeacherSpec) -> tuple[TimmModel, str]:
    repository = getattr(get_pretrained_cfg(spec.value), 'hf_hub_id', None)
    if repository is None:  # a few have a URL, or no weights
        return create(spec.value, pretrained=True), spec.text
    weights = fetch(spec.text, repository, with_config=False)
    return create(spec.value, pretrained=True, pretrained_cfg_overlay=_only(weights)), spec.text


def _only(weights: Path) -> dict[str, Any]:
    """Makes timm load this file, whatever else a config names."""
    return {'file': str(weights), 'source': None, 'state_dict': None, 'custom_load': False}
