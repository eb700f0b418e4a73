"""Tests of timm's own sdist, which drive a training script as the module `train`, pass with our script."""
import os
from pathlib import Path

import pytest

from ..conftest import ROOT, run

TESTS = (
    'test_stop_epoch_and_milestones', 'test_stop_epoch_out_of_range', 'test_resume_auto_in_place',
    'test_resume_auto_requires_experiment', 'test_fresh_run_resets_existing_summary',
)


@pytest.mark.skipif('TIMM_SDIST' not in os.environ, reason='set TIMM_SDIST to the unpacked sdist of timm 1.0.31')
@pytest.mark.parametrize('autoload', ['1', '0'])
def test_timms_own_tests(tmp_path, autoload):
    tests = Path(os.environ['TIMM_SDIST'], 'tests')
    for name in ('conftest.py', 'test_train_resume.py'):  # beside the sdist's timm, which must not be imported
        (tmp_path / name).write_text((tests / name).read_text())
    done = run(
        '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', tmp_path,
        *(f'{tmp_path}/test_train_resume.py::{name}' for name in TESTS),
        PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "examples"}', TIMM_AIKD_AUTOLOAD=autoload)
    assert f'{len(TESTS)} passed' in done.stdout
