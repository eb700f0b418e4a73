"""What the tests of teachers share."""
import pytest
import torch

from ..support.teachers import source


@pytest.fixture(autouse=True)
def as_it_was_saved(monkeypatch):
    """No folding and no other layout: answers are compared to the last bit. test_inference.py is about those."""
    monkeypatch.setattr('timm_aikd.teacher.load.folded', lambda model: (model, []))
    monkeypatch.setattr('timm_aikd.teacher.load.forward_layout', lambda *_: torch.preserve_format)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, so that specs are as short as their users write them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def student():
    return source(9)
