"""The tables of README and guides that come from code, tests and results.

    python -m tests.support.readme     # write them again
"""
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from timm_aikd import AikdConfig

from ..script.interactions_table import ROWS

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / 'examples' / 'guides'
RESULTS = ROOT / 'examples' / 'results' / 'README.md'
KEPT = sorted(RESULTS.parent.glob('*.csv'))
PAGES = [ROOT / 'README.md', RESULTS, *sorted(GUIDES.glob('*.md'))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, ['---'] * len(header), *rows))


def interactions_table() -> str:
    """What a training script can do, and what AI-KD then does: a row for each named row of the tests' table."""
    return markdown(['with', '', ''], [
        [row.what, 'refused' if row.refused else 'works', row.note] for row in ROWS if row.what])


def benchmark_tables() -> str:
    """What the accuracy benchmark prints of the results that are kept; a run of other defaults is not among them."""
    script = ROOT / 'examples' / 'benchmarks' / 'accuracy.py'
    command = [sys.executable, script, '--report', '--results', *KEPT]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def gains_table() -> str:
    """The benchmark's table of gains, as it was printed into the results."""
    section = RESULTS.read_text().partition('\n## Gains\n')[2].partition('\n## ')[0]
    return '\n'.join(line for line in section.splitlines() if line.startswith('|'))


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    'benchmark': (RESULTS, benchmark_tables),
    'gains': (ROOT / 'README.md', gains_table),
    'options': (GUIDES / 'options.md', AikdConfig.options_table),
    'interactions': (GUIDES / 'interactions.md', interactions_table),
}


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table between its two comments."""
    changed, count = re.subn(
        rf'(<!-- table: {name} -->\n).*?(<!-- end -->)', lambda found: f'{found[1]}{table}\n{found[2]}', page,
        flags=re.DOTALL)
    if count != 1:
        raise LookupError(f'{count} places for the table {name!r}, expected 1')
    return changed


def main() -> None:
    for name, (path, table) in TABLES.items():
        path.write_text(with_table(path.read_text(), name, table()))


if __name__ == '__main__':
    main()
