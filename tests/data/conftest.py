from collections.abc import Iterator

import datasets
import huggingface_hub.constants
import pytest
import torch

from hfkd.data import ImageColumns, find_columns, load_digits


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, no Hub, and a dataset cache that ends with the test session."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> datasets.Dataset:
    return load_digits()


@pytest.fixture(scope="session")
def digit_columns(digits: datasets.Dataset) -> ImageColumns:
    return find_columns(digits.features)
