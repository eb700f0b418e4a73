"""Predictions to records and back, against float64 probabilities."""
import numpy as np
import pytest
import torch

from timm_aikd import AikdError, RecordFormat
from timm_aikd.memory.records import version_at


def logits(size, classes, scale=3.):
    return scale * torch.randn(size, classes, generator=torch.Generator().manual_seed(0))


def test_dense_records_hold_log_probabilities():
    z, y = logits(6, 10), torch.arange(6)
    records = RecordFormat(10)
    coded = records.encode(z, y, version_at(2, 7, 1))
    assert coded.shape == (6, records.numpy.itemsize) == (6, 8 + 4 + 2 * 10)
    fields = coded.numpy().view(records.numpy)
    assert fields['label'].squeeze(-1).tolist() == y.tolist()
    assert set(fields['version'].flatten().tolist()) == {3 * 2 ** 40 + 7 * 2 ** 16 + 1}
    past = records.decode(coded)
    exact = z.double().softmax(-1).log()
    torch.testing.assert_close(past.double(), exact, rtol=5e-4, atol=5e-4)
    torch.testing.assert_close((past / 4).softmax(-1).double(), (exact / 4).softmax(-1), rtol=5e-3, atol=0)


def test_float32_rows_are_exact():
    z = logits(6, 10)
    past = (records := RecordFormat(10, dtype=torch.float32)).decode(records.encode(z, torch.arange(6), 1))
    assert torch.equal(past, z.log_softmax(-1))


@pytest.mark.parametrize('classes, topk', [(5, None), (10, 3), (40000, 7)])
def test_a_batch_of_one(classes, topk):
    z = logits(3, classes)
    records = RecordFormat(classes, topk)
    whole = records.decode(records.encode(z, torch.arange(3), 1))
    assert torch.equal(records.decode(records.encode(z[:1], torch.arange(1), 1)), whole[:1])


@pytest.mark.parametrize('classes, id_bytes', [(1000, 2), (32768, 2), (32769, 4), (40000, 4)])
def test_the_largest_are_kept_and_the_rest_spread_evenly(classes, id_bytes):
    z = logits(5, classes)
    z[0, -1] = 20.  # the last class id is the one that could wrap
    z[1, 3] = 60.  # all the mass in one class: the rounded tail must not go below 0
    records = RecordFormat(classes, topk=9)
    assert records.numpy.itemsize == 12 + 9 * (2 + id_bytes)
    past = records.decode(records.encode(z, torch.zeros(5, dtype=torch.long), 1))
    assert past.shape == (5, classes) and not past.isnan().any()
    probs, kept = past.double().softmax(-1), z.topk(9).indices
    exact = z.double().softmax(-1)
    torch.testing.assert_close(probs.gather(1, kept), exact.gather(1, kept), rtol=2e-2, atol=0)
    others = torch.ones_like(z, dtype=torch.bool).scatter_(1, kept, False)
    for row, mask, mass in zip(probs, others, 1 - exact.gather(1, kept).sum(-1), strict=True):
        assert row[mask].max() == row[mask].min() == pytest.approx(mass.item() / (classes - 9), rel=0.1, abs=1e-6)


def test_kept_probabilities_that_round_to_more_than_1_leave_nothing_to_the_rest():
    """float16 rounds about half of the sums above 1; what is left is then 0 and not the size of the excess."""
    z = logits(200, 30)
    z[:, 9:] -= 40.  # all mass in the 9 that are kept
    records = RecordFormat(30, topk=9)
    coded = records.encode(z, torch.zeros(200, dtype=torch.long), 1)
    kept = np.exp(coded.numpy().view(records.numpy)['values'].squeeze(1).astype(np.float64)).sum(-1)
    past = records.decode(coded)
    rest = past[:, 9:].double().exp()
    above = torch.from_numpy(kept > 1 + 1e-5)
    below = torch.from_numpy(kept < 1 - 1e-5)
    assert above.sum() > 50 and below.sum() > 50
    assert (rest[above] == 0).all() and not past.isnan().any()
    expected = torch.from_numpy((1 - kept) / 21)[below]
    torch.testing.assert_close(rest[below], expected[:, None].repeat(1, 21), rtol=0.02, atol=0)


def test_logits_of_a_bce_are_kept_and_the_others_impossible():
    z, y = logits(4, 10), torch.arange(4)
    past = (records := RecordFormat(10, binary=True)).decode(records.encode(z, y, 1))
    torch.testing.assert_close(past, z, rtol=1e-3, atol=0)
    past = (records := RecordFormat(10, topk=3, binary=True)).decode(records.encode(z, y, 1))
    kept = z.topk(3).indices
    torch.testing.assert_close(past.gather(1, kept), z.gather(1, kept), rtol=1e-3, atol=0)
    assert (past.sigmoid() == 0).sum(-1).tolist() == [7] * 4


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('topk', [None, 3, 8])
def test_extremes_are_certain_and_nan_is_told(binary, topk):
    z = logits(5, 10)
    z[0, 0], z[1, 0], z[2, 7] = 1e30, -1e30, torch.nan
    if not binary:
        z[4, 6] = torch.inf  # an overflow; a BCE takes it as certain
    records = RecordFormat(10, topk, binary)
    coded = records.encode(z, torch.zeros(5, dtype=torch.long), 1)
    values = coded.numpy().view(records.numpy)['values'].squeeze(1)
    assert torch.from_numpy(values[:, 0]).isnan().tolist() == [False, False, True, False, not binary]
    probs = (torch.sigmoid if binary else torch.softmax)(records.decode(coded), *[-1] * (not binary))
    assert probs[[0, 1, 3]].isfinite().all() and probs[0, 0] == 1
    assert probs[1, 0] == pytest.approx(0, abs=0.05)  # with K = 3 its share of the rest


def test_versions_grow_with_time():
    moments = [(epoch, step, rank) for epoch in (0, 1, 500) for step in (0, 1, 2 ** 24 - 1) for rank in (0, 65535)]
    versions = [version_at(*moment) for moment in moments]
    assert versions == sorted(set(versions)) and versions[0] > 0 and versions[-1] < 2 ** 63


def test_how_many_are_kept():
    assert RecordFormat(1024).topk == 1024 and RecordFormat(1025).topk == 128
    assert RecordFormat(21841, 21841).is_dense and RecordFormat(10, 1).numpy.itemsize == 16
    for bad in (0, 11, -1):
        with pytest.raises(AikdError, match=f'`memory_topk` {bad}: allowed is 1 to the number of classes, 10'):
            RecordFormat(10, bad)
