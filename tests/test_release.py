"""What is published: the distributions hold what they should and nothing else, and say what they need."""
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser

import pytest

from timm_aikd import __version__

from .conftest import ROOT

PACKAGE = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'timm_aikd').rglob('*') if path.suffix in ('.py', '.typed')}
METADATA = f'timm_aikd-{__version__}.dist-info'


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """Wheel and sdist, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', folder, ROOT], check=True, capture_output=True)
    wheel, sdist = folder / f'timm_aikd-{__version__}-py3-none-any.whl', folder / f'timm_aikd-{__version__}.tar.gz'
    assert set(folder.iterdir()) == {wheel, sdist}
    return wheel, sdist


def test_the_wheel_is_the_package_alone(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        metadata = HeaderParser().parsestr(wheel.read(f'{METADATA}/METADATA').decode())
        entry_points = wheel.read(f'{METADATA}/entry_points.txt').decode()
    notes = {f'{METADATA}/{name}' for name in ('METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'licenses/LICENSE')}
    assert 'timm_aikd/py.typed' in names and names == PACKAGE | notes
    needed = {re.match(r'[\w-]+', line)[0] for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line}
    assert needed == {'torch', 'timm', 'safetensors', 'huggingface-hub', 'tqdm'}
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['Requires-Python'] == '>=3.10'
    assert metadata.get_payload() == (ROOT / 'README.md').read_text()
    assert 'timm_aikd = timm_aikd.script.autoload:arm' in entry_points


def test_the_sdist_is_the_clone(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {member.name.partition('/')[2] for member in sdist.getmembers() if member.isfile()}
    known = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if known.returncode:
        pytest.skip('no clone to compare with')
    tracked = set(known.stdout.split())
    # a file that git does not know yet is not litter: its commit is being tested
    new = set(subprocess.run(
        ['git', 'ls-files', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert tracked - {'.ci/run'} <= names <= (tracked | new) - {'.ci/run'} | {'PKG-INFO'}


def test_the_changelog_has_the_version():
    headings = re.findall(r'^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert headings[0] == 'Unreleased' and __version__ in headings and '0.1.0' in headings
