"""Pushing a saved model tree to the Hub: checked before training, staged by an allow-list, uploaded in one commit."""

import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hfkd.errors import InputError, RunError
from hfkd.hub.errors import HUB_ERRORS, explain, is_transient
from hfkd.hub.manifest import MANIFEST_NAME
from hfkd.hub.remote_code import peer_folders


# Seconds before the second and the third try. The client itself repeats single requests inside each try.
RETRY_DELAYS_S = (1.0, 4.0)
# Seconds without a byte from the Hub after which a request has failed.
TIMEOUT_S = 60.0

_TEXT_SUFFIXES = (".json", ".py", ".md", ".yaml")
# The manifest covers files that stay at home, and the Trainer's state is of use to a resumed run only.
_STAY = (MANIFEST_NAME, "trainer_state.json")
# httpx2 puts header values it cannot send into its error message, so nothing odd may get that far.
_TOKEN = re.compile(r"[A-Za-z0-9_.~+/=-]+")

# The line of a card's usage snippets that names the model.
_CARD_REPO = re.compile(r'^repo = ".*"$', re.MULTILINE)
# Where they load it, with the branch that an earlier push may have named.
_CARD_LOADS = re.compile(r'((?:model=|from_pretrained\()repo)(?:, revision="[^"]*")?')

T = TypeVar("T")


def card_repo_line(name: str) -> str:
    """The one line of a card's usage snippets that names the model; a push replaces it by the repo's id."""
    return f"repo = {json.dumps(name)}"


def name_repo_in_card(folder: Path, repo_id: str, revision: str | None = None) -> None:
    """Let the usage snippets of `folder`'s card load `repo_id` at `revision`, whatever they loaded before."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        branch = f", revision={json.dumps(revision)}" if revision else ""
        text = _CARD_LOADS.sub(lambda found: found.group(1) + branch, text)
        card.write_text(_CARD_REPO.sub(lambda _: card_repo_line(repo_id), text), encoding="utf-8")


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, NAME or NAMESPACE/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def stage(folder: Path | str) -> Path:
    """Copy what the Hub is to get from a saved tree to a new temporary folder, which the caller removes.

    That is, of the root, of `student_1`, `student_2`, ..., `generator` and `discriminator`: the weights
    (`model*.safetensors`) and all json, py, md, png and yaml files. Optimizer states, pickles, checkpoints and
    training-only modules stay.

    Raises:
        InputError: `folder` holds no saved model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, so no saved model; name a folder that save_model wrote")
    peers = peer_folders(folder)
    staged = Path(tempfile.mkdtemp(prefix="hfkd-push-"))
    try:
        for source in [folder, *peers]:
            destination = staged / source.relative_to(folder)
            destination.mkdir(exist_ok=True)
            for path in sorted(source.iterdir()):
                if path.is_file() and _is_published(path):
                    shutil.copyfile(path, destination / path.name)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def check_target(
    repo_id: str, *, token: str | None = None, private: bool | None = None, endpoint: str | None = None
) -> str:
    """Make sure, before any work is done, that a push will be accepted; creates the repo if it does not exist.

    `token` and `endpoint` default to the saved login and to HF_ENDPOINT. Returns the full id, NAMESPACE/NAME.

    Raises:
        InputError: the id is malformed, the token missing, wrong, or not allowed to write there, or the Hub does not
            answer.
    """
    api = _client(token, endpoint)
    try:
        validate_repo_id(repo_id)
        user = _with_retries(lambda: api.whoami())
        full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        _check_rights(user, full_id)
        _with_retries(lambda: api.create_repo(full_id, private=private, exist_ok=True))
    except InputError:
        raise
    except HUB_ERRORS as error:
        raise InputError(f"cannot push to {repo_id}: {explain(error, repo_id, api.endpoint)}") from error
    return full_id


@overload
def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    token: str | None = ...,
    commit_message: str = ...,
    private: bool | None = ...,
    revision: str | None = ...,
    endpoint: str | None = ...,
    run_as_future: Literal[False] = False,
) -> CommitInfo: ...


@overload
def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    token: str | None = ...,
    commit_message: str = ...,
    private: bool | None = ...,
    revision: str | None = ...,
    endpoint: str | None = ...,
    run_as_future: Literal[True],
) -> Future[CommitInfo]: ...


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    token: str | None = None,
    commit_message: str = "Upload with hfkd",
    private: bool | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Upload a saved tree (see `stage`) to `repo_id` in one commit, creating the repo and the branch `revision`.

    The tree is copied before the call returns, so training may write to it again at once. Pushes of one process run
    one after the other, in the order of the calls. The card's usage snippets get the repo's id.

    Returns:
        The commit's info, or with `run_as_future` a future of it.

    Raises:
        InputError: no usable token, or `folder` holds no saved model.
        RunError: the push failed, after a few tries where trying again makes sense; the message has the line that
            repeats it. With `run_as_future` it is the future that raises it.
    """
    api = _client(token, endpoint)
    future: Future[CommitInfo] = Future()
    try:
        staged = _prepare(folder, repo_id, revision, str(api.token))
    except (OSError, RunError) as error:
        future.set_exception(_failure(error, folder, repo_id, revision, api))
    else:
        # Also when the caller waits: the queue keeps this push behind those under way.
        future = huggingface_hub.run_as_future(_push, api, staged, folder, repo_id, commit_message, private, revision)
    return future if run_as_future else future.result()


def _prepare(folder: Path | str, repo_id: str, revision: str | None, token: str) -> Path:
    staged = stage(folder)
    try:
        name_repo_in_card(staged, repo_id, revision)
        _refuse_secret(staged, token)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def _push(
    api: HfApi,
    staged: Path,
    folder: Path | str,
    repo_id: str,
    message: str,
    private: bool | None,
    revision: str | None,
) -> CommitInfo:
    try:
        return _with_retries(lambda: _commit(api, staged, repo_id, message, private, revision))
    except Exception as error:
        raise _failure(error, folder, repo_id, revision, api) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _failure(error: Exception, folder: Path | str, repo_id: str, revision: str | None, api: HfApi) -> RunError:
    cause = str(error) if isinstance(error, RunError) else explain(error, repo_id, api.endpoint)
    return push_failure(cause, folder, repo_id, revision)


def push_failure(cause: str, folder: Path | str, repo_id: str, revision: str | None = None) -> RunError:
    """The error of a push that failed for `cause`, with the line that repeats it."""
    again = f"hfkd push {shlex.quote(str(folder))} {shlex.quote(repo_id)}"
    if revision is not None:
        again += f" --revision {shlex.quote(revision)}"
    return RunError(f"push to {repo_id} failed: {cause}; all files are kept, to repeat: {again}")


def _commit(
    api: HfApi, staged: Path, repo_id: str, message: str, private: bool | None, revision: str | None
) -> CommitInfo:
    # upload_folder may split a folder over several commits, and the repo would not load in between.
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(staged).as_posix(), str(path)) for path in files]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _client(token: str | None, endpoint: str | None) -> HfApi:
    token = (token or huggingface_hub.get_token() or "").strip()
    if not token:
        raise InputError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
    if not _TOKEN.fullmatch(token):
        raise InputError("the Hub token holds characters that no token has: copy it anew, alone on its line")
    session = get_session()
    if session.timeout.read is None:
        # The client waits for ever by default, and a Hub that does not answer must not hang a training run.
        session.timeout = TIMEOUT_S
    return HfApi(endpoint=endpoint, token=token, library_name="hfkd")


def _check_rights(user: dict[str, Any], repo_id: str) -> None:
    namespace = repo_id.split("/")[0]
    organizations = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"cannot push to {repo_id}: the token may only read; make one with the role 'write'")
    if namespace != user["name"] and namespace not in organizations:
        mine = ", ".join([user["name"], *organizations])
        raise InputError(f"cannot push to {repo_id}: {namespace!r} is not a namespace of this token (it has: {mine})")
    if organizations.get(namespace) == "read":
        raise InputError(f"cannot push to {repo_id}: user {user['name']!r} may only read in {namespace!r}")


def _with_retries(call: Callable[[], T]) -> T:
    for delay in RETRY_DELAYS_S:
        try:
            return call()
        except HUB_ERRORS as error:
            if not is_transient(error):
                raise
        time.sleep(delay)
    return call()


def _is_published(path: Path) -> bool:
    if path.name in _STAY:
        return False
    is_weights = path.name.startswith("model") and path.suffix == ".safetensors"
    return is_weights or path.suffix in _TEXT_SUFFIXES or path.suffix == ".png"


def _refuse_secret(staged: Path, token: str) -> None:
    for path in sorted(path for path in staged.rglob("*") if path.suffix in _TEXT_SUFFIXES):
        if token.encode() in path.read_bytes():
            name = path.relative_to(staged)
            raise RunError(f"{name} contains the Hub token, which would be published: remove it and make a new token")
