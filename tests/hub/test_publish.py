import logging
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub

from hfkd.errors import InputError, RunError
from hfkd.hub import publish
from hfkd.hub.publish import check_target, push_folder, stage


PUBLISHED = {
    f"{place}{name}"
    for place in ("", "student_1/")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "modeling_tiny.py")
} | {"README.md", "curve.png", "resolved_config.yaml"}
REPO = "tester/pair"
COMMIT = "POST .*/commit/main"
# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAYS_S", (0.0, 0.0))


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pushes keep their copies for as long as they need them."""
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "staging"))
    return tmp_path / "staging"


def push(hub: LoopbackHub, folder: Path, **options: object) -> object:
    options = {"token": hub.token, "endpoint": hub.endpoint} | options
    return push_folder(folder, REPO, **options)


def count(hub: LoopbackHub, part: str) -> int:
    return sum(part in path for _, path in hub.requests)


def test_stage_copies_the_allow_list_and_nothing_else(saved: Path) -> None:
    staged = stage(saved)
    assert {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()} == PUBLISHED
    assert (staged / "config.json").read_text() == (saved / "config.json").read_text()


def test_stage_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no config.json"):
        stage(tmp_path)


def test_push_is_one_commit_with_exactly_the_staged_files(hub: LoopbackHub, saved: Path) -> None:
    info = push(hub, saved, commit_message="Step 4")
    commits = hub.commits(REPO)
    assert [commit.title for commit in commits] == ["Step 4"] and info.oid == commits[0].oid
    files = hub.files(REPO)
    assert set(files) == PUBLISHED | {".gitattributes"}
    assert files["student_1/model.safetensors"] == (saved / "student_1/model.safetensors").read_bytes()


def test_an_unchanged_push_uploads_and_commits_nothing(hub: LoopbackHub, saved: Path) -> None:
    push(hub, saved)
    hub.requests.clear()
    push(hub, saved)
    assert len(hub.commits(REPO)) == 1
    assert count(hub, "/lfs/upload/") == 0 and count(hub, "/commit/") == 0


def test_a_push_to_a_branch_leaves_main_alone(hub: LoopbackHub, saved: Path) -> None:
    push(hub, saved, revision="step-4")
    assert set(hub.files(REPO, "step-4")) > PUBLISHED
    assert set(hub.files(REPO)) == {".gitattributes"}


CARD = """---
license: mit
---
repo = "runs"
classify = pipeline("image-classification", model=repo, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(repo, revision="old", trust_remote_code=True)
generator = AutoModel.from_pretrained(repo, revision="old", subfolder="generator", trust_remote_code=True)
"""


def test_the_card_loads_what_was_pushed(hub: LoopbackHub, saved: Path) -> None:
    (saved / "README.md").write_text(CARD)
    push(hub, saved, revision="step-4")
    branch = hub.files(REPO, "step-4")["README.md"].decode()
    assert branch.count('revision="step-4"') == 3 and f'repo = "{REPO}"' in branch and '"old"' not in branch
    push(hub, saved)
    assert "revision" not in hub.files(REPO)["README.md"].decode()


def test_a_failed_push_to_a_branch_says_how_to_repeat_it(hub: LoopbackHub, saved: Path) -> None:
    (saved / "README.md").write_text(f"my token is {hub.token}")
    with pytest.raises(RunError, match=f"to repeat: hfkd push .* {REPO} --revision step-4$"):
        push(hub, saved, revision="step-4")


def test_background_pushes_keep_their_order_and_take_the_folder_as_it_was(hub: LoopbackHub, saved: Path) -> None:
    options = {"token": hub.token, "endpoint": hub.endpoint, "run_as_future": True}
    first = push_folder(saved, REPO, commit_message="first", **options)
    (saved / "config.json").write_text('{"step": 2}')
    second = push_folder(saved, REPO, commit_message="second", **options)
    (saved / "config.json").write_text("overwritten by training")
    second.result()
    assert first.done()
    assert [commit.title for commit in hub.commits(REPO)] == ["first", "second"]
    assert hub.files(REPO, first.result().oid)["config.json"] == b"{}"
    assert hub.files(REPO)["config.json"] == b'{"step": 2}'


@pytest.mark.parametrize("private", [False, True])
def test_check_target_makes_the_repo_and_completes_its_id(hub: LoopbackHub, private: bool) -> None:
    options = {"token": hub.token, "endpoint": hub.endpoint, "private": private}
    assert check_target("pair", **options) == REPO
    assert check_target(REPO, **options) == REPO
    assert check_target("lab/pair", **options) == "lab/pair"
    assert hub.repos["models", REPO].private is private


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("pair", None, "no token"),
        ("pair", "", "no token"),
        ("pair", "hf_wrong", "HTTP 401, the token is missing, wrong or expired"),
        ("pair", "hf_dummy\nhf_dummy", "characters that no token has"),
        ("stranger/pair", "hf_dummy", "'stranger' is not a namespace of this token (it has: tester, lab)"),
        ("pair", "hf_reader", "the token may only read"),
        ("a/b/c", "hf_dummy", "'a/b/c' is not a repo id"),
        ("tester/pa ir", "hf_dummy", "is not a repo id"),
    ],
)
def test_check_target_refuses_in_one_line(hub: LoopbackHub, repo_id: str, token: str | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_target(repo_id, token=token, endpoint=hub.endpoint)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not hub.repos


def test_check_target_names_an_unreachable_hub(hub: LoopbackHub) -> None:
    with pytest.raises(InputError, match="http://127.0.0.1:9 cannot be reached"):
        check_target("pair", token=hub.token, endpoint="http://127.0.0.1:9")


def test_check_target_names_offline_mode(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode: unset HF_HUB_OFFLINE"):
        check_target("pair", token=hub.token, endpoint=hub.endpoint)


def test_check_target_survives_a_failing_hub_that_recovers(hub: LoopbackHub) -> None:
    hub.fail_next("whoami", 503, times=2)
    assert check_target("pair", token=hub.token, endpoint=hub.endpoint) == REPO


@pytest.mark.parametrize(
    ("route", "status", "message"),
    [
        (COMMIT, 400, "HTTP 400, the Hub refuses what was sent"),
        (COMMIT, 401, "HTTP 401, the token is missing, wrong or expired"),
        ("repos/create", 401, "HTTP 401"),
        (COMMIT, 403, "HTTP 403, the token has no right to do this in tester/pair"),
        (COMMIT, 404, "HTTP 404, tester/pair or its revision does not exist"),
        (COMMIT, 409, "HTTP 409, another operation on tester/pair is in the way"),
        (COMMIT, 412, "HTTP 412, tester/pair got another commit meanwhile"),
        (COMMIT, 500, "HTTP 500, the Hub fails by itself"),
        ("validate-yaml", 502, "not the Hub's (not JSON)"),
        ("info/lfs/objects/batch", 403, "HTTP 403"),
        ("PUT /lfs/upload", 400, "HTTP 400"),
        (COMMIT, "drop", "cannot be reached (RemoteProtocolError)"),
    ],
)
def test_a_failed_push_says_why_and_how_to_repeat_it(
    hub: LoopbackHub, saved: Path, route: str, status: int | str, message: str
) -> None:
    hub.fail_next(route, status, times=9)
    with pytest.raises(RunError) as caught:
        push(hub, saved)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"hfkd push {saved} {REPO}")
    assert (saved / "training_state").is_dir()


def test_a_hub_that_never_answers_is_given_up(hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(hub, saved)
    monkeypatch.setattr(publish.get_session(), "timeout", 0.2)
    (saved / "config.json").write_text("{ }")
    hub.fail_next(COMMIT, "hang", times=3)
    with pytest.raises(RunError, match="does not answer"):
        push(hub, saved)


def test_the_client_is_kept_from_waiting_for_ever(hub: LoopbackHub) -> None:
    publish.get_session().timeout = None
    check_target("pair", token=hub.token, endpoint=hub.endpoint)
    assert publish.get_session().timeout.read == publish.TIMEOUT_S


@pytest.mark.parametrize(("route", "status"), [(COMMIT, 412), (COMMIT, 500), (COMMIT, "drop"), ("create", 503)])
def test_a_passing_failure_is_tried_again(hub: LoopbackHub, saved: Path, route: str, status: int | str) -> None:
    hub.fail_next(route, status, times=2)
    push(hub, saved)
    assert len(hub.commits(REPO)) == 1 and set(hub.files(REPO)) > PUBLISHED


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_lasting_failure_is_not_tried_again(hub: LoopbackHub, saved: Path, status: int) -> None:
    hub.fail_next(COMMIT, status)
    with pytest.raises(RunError):
        push(hub, saved)
    assert count(hub, "/commit/main") == 1


@pytest.mark.parametrize("status", [None, 403])
def test_the_staged_copy_does_not_outlive_the_push(
    hub: LoopbackHub, saved: Path, staging: Path, status: int | None
) -> None:
    if status:
        hub.fail_next(COMMIT, status)
    with pytest.raises(RunError) if status else nullcontext():
        push(hub, saved)
    assert not list(staging.glob("hfkd-push-*"))
    assert stage(saved).parent == staging


def test_a_background_failure_waits_in_the_future(hub: LoopbackHub, saved: Path) -> None:
    hub.fail_next(COMMIT, 403)
    future = push_folder(saved, REPO, token=hub.token, endpoint=hub.endpoint, run_as_future=True)
    with pytest.raises(RunError, match="HTTP 403"):
        future.result()


def test_a_disk_too_full_to_stage_waits_in_the_future_too(
    hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.shutil, "copyfile", full)
    future = push_folder(saved, REPO, token=hub.token, endpoint=hub.endpoint, run_as_future=True)
    with pytest.raises(RunError, match="No space left on device.*hfkd push"):
        future.result()
    assert not hub.requests


def test_the_card_of_a_pushed_folder_names_the_repo(hub: LoopbackHub, saved: Path) -> None:
    text = (saved / "README.md").read_text()
    (saved / "README.md").write_text(text + publish.card_repo_line("runs/pair") + "\n")
    push(hub, saved)
    assert hub.files(REPO)["README.md"].decode() == text + f'repo = "{REPO}"\n'


def test_bad_metadata_is_refused_by_the_hub_and_quoted(hub: LoopbackHub, saved: Path) -> None:
    (saved / "README.md").write_text("---\nbase_model: /home/me/teacher\n---\n")
    with pytest.raises(RunError, match='HTTP 400.*"base_model" with value "/home/me/teacher" is not valid'):
        push(hub, saved)
    assert not hub.commits(REPO)


def test_a_file_with_the_token_is_never_published(hub: LoopbackHub, saved: Path) -> None:
    (saved / "resolved_config.yaml").write_text(f"hub_token: {hub.token}\n")
    with pytest.raises(RunError, match="resolved_config.yaml contains the Hub token"):
        push(hub, saved)
    assert not hub.requests


def test_the_token_appears_in_no_message_log_or_file(
    hub: LoopbackHub, saved: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "Secret" * 5
    hub.fail_next(COMMIT, 403)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(InputError) as refused:
            check_target("pair", token=secret, endpoint=hub.endpoint)
        with pytest.raises(RunError) as failed:
            push(hub, saved)
    push(hub, saved)
    written = b"".join(
        [*hub.files(REPO).values(), *(path.read_bytes() for path in saved.rglob("*") if path.is_file())]
    )
    out, err = capfd.readouterr()
    for token in (secret, hub.token):
        assert token.encode() not in written
        assert token not in caplog.text + out + err + str(refused.value) + str(failed.value)


def test_the_loopback_hub_refuses_a_stale_parent_and_a_bad_upload(hub: LoopbackHub, saved: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    first = push(hub, saved)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="new.json", repo_id=REPO)
    with pytest.raises(Exception, match="412"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="new.json", repo_id=REPO, parent_commit=first.oid)
    response = publish.get_session().put(f"{hub.endpoint}/lfs/upload/{'0' * 64}", content=b"other")
    assert response.status_code == 400
