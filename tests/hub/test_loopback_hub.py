import subprocess
import sys

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub


REPO = "tester/model"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="student_1/model.safetensors", repo_id=REPO)
    return api


def test_history_tags_and_pins(hub: LoopbackHub, api: HfApi, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = hub.commits(REPO)
    api.create_tag(REPO, tag="v1", revision=first.oid)
    api.delete_file("config.json", REPO)
    assert set(hub.files(REPO, "v1")) == {".gitattributes", "config.json"}
    assert api.model_info(REPO, revision="v1").sha == first.oid
    pins = {"v1": {"config.json"}, second.oid: {"config.json", "student_1"}, "main": {"student_1"}}
    for revision, expected in pins.items():
        cache = tmp_path_factory.mktemp("cache")
        folder = snapshot_download(REPO, revision=revision, cache_dir=cache, endpoint=hub.endpoint, token=False)
        assert {path.name for path in cache.glob("*/snapshots/*/*")} - {".gitattributes"} == expected, folder


def test_trees_and_paths(api: HfApi) -> None:
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {".gitattributes", "config.json", "student_1"}
    weights = "student_1/model.safetensors"
    assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} >= {"student_1", weights}
    assert [entry.path for entry in api.list_repo_tree(REPO, "student_1")] == [weights]
    (info,) = api.get_paths_info(REPO, [weights, "nothing"])
    assert info.size == len(b"weights") and info.lfs is not None


def test_what_is_missing_is_named_by_its_kind(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.json")
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


def test_rights(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo("tester/hidden", private=True)
    assert api.model_info("tester/hidden").private
    for token in (False, "hf_wrong"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("tester/hidden", token=token)
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_reader", 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("tester/more", token=token)
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.create_repo(REPO, exist_ok=True)


def test_faults_are_given_as_often_as_told(hub: LoopbackHub, api: HfApi) -> None:
    hub.fail_next("GET /api/models", 403, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.model_info(REPO)
    assert api.model_info(REPO).id == REPO
    assert hub.requests[-3:] == [("GET", f"/api/models/{REPO}")] * 3


def test_datasets_come_back_whole(hub: LoopbackHub) -> None:
    code = """
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
features = Features({"pixels": Value("int64"), "label": ClassLabel(names=["cat", "dog"])})
Dataset.from_dict({"pixels": [1, 2, 3], "label": [0, 1, 0]}, features=features).push_to_hub("tester/pets")
back = load_dataset("tester/pets", split="train")
print(back["pixels"], back.features["label"].names)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0].endswith("['cat', 'dog']") and "[1, 2, 3]" in result.stdout
    assert "data/train-00000-of-00001.parquet" in hub.files("tester/pets", kind="datasets")
