"""A seed and one thread for every test, and a tiny classifier of each family."""

import sys

import pytest
import torch
from tiny_classifiers import FAMILIES
from transformers import dynamic_module_utils


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def classifier(family):
    return FAMILIES[family]()


@pytest.fixture
def make_classifier():
    """Builds a tiny classifier of the named family."""
    return lambda name: FAMILIES[name]()


def remote_module_names():
    return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]


@pytest.fixture
def remote_modules(tmp_path, monkeypatch):
    """Remote code is copied into and imported from a folder of this test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in remote_module_names():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in remote_module_names():
        del sys.modules[name]
