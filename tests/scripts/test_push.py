"""Sharing through the command: pushes of `hfkd train`, `hfkd push` and what `hfkd evaluate` fetches, on a Hub."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from hub_fixtures import loopback_hub

from hfkd.hub import publish
from hfkd.scripts.cli import main


# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "tester/digits"
FAST = {
    "max_steps": 4,
    "max_train_samples": 64,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "logging_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
}
# The command in a process of its own, as HF_ENDPOINT is read when huggingface_hub is imported; it tries again at once.
COMMAND = """
import sys
from hfkd.hub import publish
from hfkd.scripts.cli import main

publish.RETRY_DELAYS_S = (0.0, 0.0)
sys.exit(main(sys.argv[1:]))
"""


def options(settings):
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run that the command has pushed at each save and at its end."""
    base = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as monkeypatch, loopback_hub(monkeypatch, base) as hub:
        monkeypatch.setattr(publish.huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        folder = base / "run"
        sharing = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": hub.token, "output_dir": folder}
        assert main(["train", "online-adversarial", *options(FAST | sharing)]) == 0
        yield SimpleNamespace(hub=hub, folder=folder)


def hfkd(shared, *argv):
    command = [sys.executable, "-c", COMMAND, *map(str, argv)]
    return subprocess.run(command, env=shared.hub.environment(), cwd=shared.folder, capture_output=True, text=True)


def test_every_push_carries_the_options_that_its_card_names(shared):
    commits = shared.hub.commits(REPO)
    assert commits[0].title == "Training in progress, step 2" and commits[-1].title == "End of training"
    for commit in commits:
        assert "hfkd train online-adversarial --config run.yaml\n" in commit.files["README.md"].content.decode()
        assert commit.files["run.yaml"].content == (shared.folder / "run.yaml").read_bytes()
    saved = yaml.safe_load((shared.folder / "run.yaml").read_text())
    assert saved["max_train_samples"] == 64 and not {"output_dir", "hub_token", "hub_model_id"} & saved.keys()


def test_a_folder_is_pushed_in_one_commit_and_evaluated_from_the_hub(shared, tmp_path):
    done = hfkd(shared, "push", shared.folder, "again", "--commit_message", "By hand")
    assert done.returncode == 0, done.stderr
    (commit,) = shared.hub.commits("tester/again")
    assert commit.title == "By hand" and done.stdout.strip().endswith(commit.oid)
    wanted = re.compile(r"(student_1/)?(\w+\.py|(preprocessor_)?config\.json|model\.safetensors)")
    alone = {"README.md", "run.yaml", "test_results.json", ".gitattributes"}
    assert [name for name in commit.files if not wanted.fullmatch(name) and name not in alone] == []
    assert alone | {"config.json", "modeling_resnet.py", "student_1/model.safetensors"} <= commit.files.keys()
    assert 'repo = "tester/again"' in commit.files["README.md"].content.decode()

    done = hfkd(shared, "evaluate", "tester/again", "--output", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    trained = json.loads((shared.folder / "test_results.json").read_text())
    assert result["n_test"] == trained["n_test"] == 359  # on the data that the repo's run.yaml names
    assert result["metrics"]["student_1_accuracy"] > 0
    assert result["metrics"] == {name: pytest.approx(trained["metrics"][name]) for name in result["metrics"]}


def test_a_branch_is_evaluated_by_its_name(shared, tmp_path):
    publish.push_folder(shared.folder, "tester/branched", token=shared.hub.token, revision="trial")
    argv = ["evaluate", "tester/branched", "--revision", "trial", "--output", tmp_path / "result.json"]
    done = hfkd(shared, *argv, "--protocol", "knn")  # whose training images, too, are those of the run
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"student_0_accuracy", "student_1_accuracy"} and min(metrics.values()) > 0.3


def test_a_repo_that_is_not_there(shared):
    done = hfkd(shared, "evaluate", "tester/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("hfkd: error: checkpoint 'tester/nowhere' is neither a folder nor a repo")
    assert "HTTP 404" in done.stderr and done.stderr.count("\n") == 1


def test_a_hub_that_fails_leaves_everything_and_says_how_to_repeat(shared):
    before = {path: path.read_bytes() for path in shared.folder.rglob("*") if path.is_file()}
    repo = "tester/failing"
    shared.hub.fail_next("POST .*failing/commit/main", 503, times=3)
    done = hfkd(shared, "push", shared.folder, repo)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"hfkd: error: push to {repo} failed: HTTP 503, the Hub fails by itself")
    assert done.stderr.endswith(f"all files are kept, to repeat: hfkd push {shared.folder} {repo}\n")
    assert done.stderr.count("\n") == 1 and shared.hub.token not in done.stderr
    assert shared.hub.commits(repo) == []
    assert {path: path.read_bytes() for path in shared.folder.rglob("*") if path.is_file()} == before
