"""One rank a host first, and what one of them meets ends all."""
import time
from functools import partial

import pytest

from timm_aikd import AikdError, ranks

from .support.distributed import spawn


def rank_calls(rank, kinds):
    """What becomes of calls that fail on some ranks, of which 0 and 2 are of one host."""
    ranks.this_host = lambda: 'ab'[rank % 2]
    outcomes, log = [], []

    def call(failures):
        log.append(rank)
        if rank in failures:
            raise failures[rank]
        return rank

    for failures in kinds:
        try:
            outcomes.append(ranks.first_on_each_host(partial(call, failures)))
        except Exception as error:
            outcomes.append(f'{type(error).__name__}: {error}')
    return outcomes, len(log)


KINDS = [
    {},
    {0: AikdError('zero')},
    {1: AikdError('one'), 0: AikdError('zero')},
    {2: AikdError('two')},
    {1: RuntimeError('two\nlines')},
    {2: OSError('late')},
    {},
]


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_what_one_rank_meets_ends_all():
    (zero, calls_zero), (one, _), (two, calls_two) = spawn(rank_calls, 3, KINDS)
    told = 'AikdError: rank 1 failed (RuntimeError: two lines): see its own message'
    late = 'AikdError: rank 2 failed (OSError: late): see its own message'
    assert zero == [0, *['AikdError: zero'] * 2, 'AikdError: two', told, late, 0]
    assert one == [1, *['AikdError: zero'] * 2, 'AikdError: two', 'RuntimeError: two\nlines', late, 1]
    assert two == [2, *['AikdError: zero'] * 2, 'AikdError: two', told, 'OSError: late', 2]
    assert calls_zero == len(KINDS) and calls_two == len(KINDS) - 3  # it was not called where a first one had failed


def test_without_a_process_group_it_is_a_call():
    assert ranks.first_on_each_host(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        ranks.first_on_each_host(lambda: 1 / 0)


def slow_rank(rank, seconds):
    def work():
        time.sleep(seconds)
        return 'done'

    return ranks.in_touch(work if rank == 0 else None), ranks.first_on_each_host(work)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_work_on_one_rank_may_outlast_the_time_out_of_the_group():
    assert spawn(slow_rank, 2, 12, seconds=8) == [('done', 'done'), (None, 'done')]


def test_without_a_process_group_the_work_is_simply_done():
    assert ranks.in_touch(lambda: 3) == 3 and ranks.in_touch(None) is None


def test_only_rank_0_logs(monkeypatch, caplog):
    for launched_as, expected in (('1', []), ('0', ['said by 0']), ('', ['said by '])):
        caplog.clear()
        monkeypatch.setenv('RANK', launched_as)
        ranks.logger.warning(f'said by {launched_as}')
        assert caplog.messages == expected
