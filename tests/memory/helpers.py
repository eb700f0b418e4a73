"""Small stores and tables with known content."""
import numpy as np
import torch

from timm_aikd.memory import RecordFormat, StoreMemory

RECORD = np.dtype([('version', '<i8'), ('label', '<i4'), ('values', '<f2', (3,))])


def store(samples=12, classes=5, tmp_path=None, **options):
    return StoreMemory(RecordFormat(classes, **options), samples, tmp_path and str(tmp_path))


def predictions(size=4, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, classes, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def records(versions, seed=0):
    made = np.zeros(len(versions), RECORD)
    made['version'], made['label'] = versions, np.arange(len(versions))
    made['values'] = np.random.default_rng(seed).normal(size=(len(versions), 3))
    return made


def content(host_table):
    return host_table.records.tobytes()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
