"""Sharing a run: every push, the first one included, leaves a repo that loads; no failed push costs a checkpoint."""

import logging
import re
import shlex
from concurrent.futures import wait
from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_fixtures import loopback_hub
from mixed_cohorts import StrangersView, expected, make_cohort, write_image
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.utils import logging as transformers_logging

from hfkd.errors import InputError, RunError
from hfkd.hub import publish
from hfkd.hub.manifest import verify_manifest
from hfkd.trainers.online_adversarial import OnlineAdversarialTrainer


# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
_ITS_OWN_WARNING = "ignore:Use 'content=:DeprecationWarning"
# The fixture `shared` trains, pushes and loads once for all tests.
pytestmark = pytest.mark.filterwarnings(_ITS_OWN_WARNING)
REPO = "tester/cohort"
COMMIT = "POST .*/commit/main"
# No curve to draw.
SMALL = {"eval_strategy": "no", "logging_strategy": "no"}
STUDENTS = {0: {}, 1: {"subfolder": "student_1"}, 2: {"subfolder": "student_2"}}


class AwaitPush(TrainerCallback):
    """Lets each push end before training goes on, so that none is left out for the one before it."""

    def __init__(self, then=lambda push: None):
        self.then = then

    def on_save(self, args, state, control, **_):
        if self.trainer._push is not None:
            wait([self.trainer._push], timeout=60)
            self.then(self.trainer._push)


def make_shared(output_dir, hub, then=lambda push: None, **config):
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": hub.token}
    await_push = AwaitPush(then)
    trainer = make_cohort(output_dir, callbacks=[await_push], **(settings | config))
    await_push.trainer = trainer
    return trainer


def titles(hub, repo=REPO):
    return [commit.title for commit in hub.commits(repo)]


@contextmanager
def default_hub(monkeypatch, folder):
    """A Hub to which the trainers push."""
    with loopback_hub(monkeypatch, folder) as server:
        monkeypatch.setattr(publish.huggingface_hub.constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with default_hub(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Three runs: one that pushes at every save, one at the end to a private repo, one to a branch."""
    base = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as monkeypatch, default_hub(monkeypatch, base) as hub:
        every = make_shared(base / "every", hub)
        every.train()
        while_training = titles(hub)
        metrics = every.evaluate()
        every.push_to_hub()

        once = {"hub_model_id": "late", "hub_strategy": "end", "hub_private_repo": True}
        late = make_shared(base / "late", hub, **once, max_steps=2)
        late.train()
        late_while_training = titles(hub, "tester/late")
        late.push_to_hub()

        branch = make_shared(base / "branch", hub, hub_model_id="lab/branch", hub_revision="trial", max_steps=2)
        branch.train()
        branch.push_to_hub(revision="release")

        view = StrangersView()
        for k, where in STUDENTS.items():
            view.load(f"first {k}", REPO, **where, revision=hub.commits(REPO)[0].oid)
            view.load(f"last {k}", REPO, **where)
        view.load("private 0", "tester/late")
        view.load("branch 0", "lab/branch", revision="trial")
        view.run_snippets("card", snippets(hub.files(REPO)))
        for name in ("trial", "release"):
            view.run_snippets(f"{name} card", snippets(hub.files("lab/branch", name)))
        (base / "stranger").mkdir()
        found = view.look(hub.environment(), base / "stranger")
        yield SimpleNamespace(**locals())


def snippets(files):
    return re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)


def assert_loads(shared, name, networks):
    image = write_image(shared.base)
    for k, network in enumerate(networks):
        found = shared.found[f"{name} {k}"]
        assert "failed" not in found, found["failed"]
        for key, value in expected(network, image).items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


# -- what is pushed --------------------------------------------------------------------------------------------------


def test_the_first_push_while_training_already_loads(shared):
    checkpoint = shared.base / "every/checkpoint-2"
    networks = [AutoModelForImageClassification.from_pretrained(checkpoint, **where) for where in STUDENTS.values()]
    assert_loads(shared, "first", networks)
    first = shared.hub.files(REPO, shared.hub.commits(REPO)[0].oid)
    assert {"README.md", "curve.png", "preprocessor_config.json", "modeling_wide_resnet.py"} <= first.keys()
    assert "student_2/preprocessor_config.json" in first


def test_one_commit_for_each_save_and_one_at_the_end(shared):
    assert shared.while_training == [f"Training in progress, step {step}" for step in (2, 4, 6)]
    assert titles(shared.hub) == [*shared.while_training, "End of training"]


def test_the_end_of_training_is_what_loads(shared):
    assert_loads(shared, "last", shared.every.model.students)
    pushed, folder = shared.hub.files(REPO), shared.base / "every"
    for name in ("model.safetensors", "student_1/model.safetensors", "student_2/config.json", "curve.png"):
        assert pushed[name] == (folder / name).read_bytes()


def test_the_last_card_has_what_was_measured(shared):
    text = shared.hub.files(REPO)["README.md"].decode()
    (entry,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    values = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    wanted = {f"Student {k}": f"student_{k}" for k in range(3)} | {"Mean of the students": "mean"}
    wanted |= {"Ensemble (mean of logits)": "ensemble", "Ensemble (mean of probabilities)": "ensemble_prob"}
    assert {name.removeprefix("Accuracy, ") for name in values if name.startswith("Accuracy")} == wanted.keys()
    for subject, key in wanted.items():
        assert values[f"Accuracy, {subject}"] == shared.metrics[f"eval_{key}_accuracy"]
    for k in range(3):
        assert values[f"Top-5 accuracy, Student {k}"] == shared.metrics[f"eval_student_{k}_top5"]
    assert entry["name"] == "cohort" and str(shared.base) not in text


@pytest.mark.parametrize(("card", "run"), [("card", "every"), ("trial card", "branch"), ("release card", "branch")])
def test_the_cards_code_runs_from_the_hub(shared, card, run):
    """Also where the run was pushed to a branch, and main holds nothing."""
    found, image = shared.found[card], write_image(shared.base)
    assert "failed" not in found, found["failed"]
    first, second = (expected(student, image)["scores"] for student in getattr(shared, run).model.students[:2])
    assert found["classify"] == pytest.approx(first, rel=1e-4) and found["peer"] == pytest.approx(second, rel=1e-4)


def test_nothing_of_the_training_and_no_token_is_pushed(shared):
    wanted = re.compile(
        r"(student_[12]/)?(\w+\.py|(preprocessor_)?config\.json|model\.safetensors|README\.md|curve\.png)"
    )
    for repo in (REPO, "tester/late", "lab/branch"):
        for commit in shared.hub.commits(repo):
            for name, blob in commit.files.items():
                assert name == ".gitattributes" or wanted.fullmatch(name), name
                assert shared.hub.token.encode() not in blob.content


def test_the_token_is_in_no_file_and_in_no_print_of_the_config(shared):
    files = [path for path in shared.base.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if shared.hub.token.encode() in path.read_bytes()]
    args = shared.every.args
    assert args.hub_token == shared.hub.token
    assert not [text for text in (repr(args), str(args), args.to_json_string()) if shared.hub.token in text]


def test_the_strategy_end_pushes_once_and_to_a_private_repo(shared):
    assert shared.late_while_training == [] and titles(shared.hub, "tester/late") == ["End of training"]
    assert shared.hub.repo("tester/late").private and not shared.hub.repo(REPO).private
    assert_loads(shared, "private", shared.late.model.students[:1])


def test_a_revision_is_pushed_to_its_branch(shared):
    assert set(shared.hub.files("lab/branch")) == {".gitattributes"}
    for name in ("trial", "release"):
        code = "".join(snippets(shared.hub.files("lab/branch", name)))
        assert code.count(f'repo, revision="{name}"') == code.count("repo,") == 4
    assert "revision" not in "".join(snippets(shared.hub.files(REPO)))
    assert_loads(shared, "branch", shared.branch.model.students[:1])


# -- when pushes fail ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(publish, "RETRY_DELAYS_S", (0.0, 0.0))


@pytest.fixture
def warnings(caplog):
    """What transformers' loggers say, which by default passes pytest by."""
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.message for record in caplog.records if "push" in record.message]
    transformers_logging.disable_propagation()


# Route, answer, and what the warning says of it.
FAULTS = [
    (COMMIT, 503, "HTTP 503"),
    (COMMIT, 403, "HTTP 403"),
    (COMMIT, 412, "HTTP 412"),
    ("PUT /lfs/upload", 400, "HTTP 400"),
    (COMMIT, "drop", "cannot be reached"),
    (COMMIT, "hang", "does not answer"),
]


def test_training_survives_failed_pushes_and_the_next_ones_make_up_for_them(hub, tmp_path, monkeypatch, warnings):
    """Twelve saves: each odd push fails in another way, each even one succeeds."""
    remaining = list(FAULTS)

    def change(push):
        if hub._faults:
            hub._faults.clear()
        elif remaining:
            route, status, _ = remaining.pop(0)
            hub.fail_next(route, status, times=99)

    trainer = make_shared(tmp_path / "run", hub, change, **SMALL, save_steps=1, max_steps=12)
    monkeypatch.setattr(publish.get_session(), "timeout", 0.3)
    change(None)
    trainer.train()
    assert titles(hub) == [f"Training in progress, step {step}" for step in range(2, 13, 2)]
    for step in range(1, 13):
        verify_manifest(tmp_path / f"run/checkpoint-{step}")
    assert len(warnings()) == len(FAULTS)
    for (_, _, message), step, warning in zip(FAULTS, range(1, 13, 2), warnings(), strict=True):
        assert message in warning and "training is not affected" in warning and "\n" not in warning
        assert shlex.join(["hfkd", "push", str(tmp_path / f"run/checkpoint-{step}"), REPO]) in warning
        assert hub.token not in warning


def test_training_survives_the_loss_of_the_token(hub, tmp_path, monkeypatch, warnings):
    def forget(push):
        monkeypatch.delenv("HF_TOKEN", raising=False)

    monkeypatch.setenv("HF_TOKEN", hub.token)
    trainer = make_shared(tmp_path / "run", hub, forget, hub_token=None, **SMALL)
    trainer.train()
    assert titles(hub) == ["Training in progress, step 2"]
    assert len(warnings()) == 2 and all("no token for the Hub" in warning for warning in warnings())
    with pytest.raises(RunError, match=f"no token for the Hub.*hfkd push {tmp_path / 'run'} {REPO}"):
        trainer.push_to_hub()


def test_a_save_during_a_push_leaves_out_its_own(hub, tmp_path, monkeypatch):
    commit, finalize, trained = publish._commit, OnlineAdversarialTrainer._finalize_training, Event()

    def slow_commit(*args):
        assert trained.wait(30)
        return commit(*args)

    def finalize_training(self, *args):
        trained.set()
        return finalize(self, *args)

    trainer = make_shared(tmp_path / "run", hub, **SMALL)
    trainer.callback_handler.remove_callback(AwaitPush)
    monkeypatch.setattr(publish, "_commit", slow_commit)
    monkeypatch.setattr(OnlineAdversarialTrainer, "_finalize_training", finalize_training)
    trainer.train()
    trainer.push_to_hub()
    assert titles(hub) == ["Training in progress, step 2", "End of training"]


@pytest.mark.parametrize("way", ["push_to_hub", "save_model"])
def test_a_failed_last_push_leaves_everything_saved_and_says_how_to_repeat_it(hub, tmp_path, way):
    folder = tmp_path / "my run"
    trainer = make_shared(folder, hub, hub_strategy="end", max_steps=2, **SMALL)
    trainer.train()
    hub.fail_next(COMMIT, 503, times=99)
    with pytest.raises(RunError) as caught:
        getattr(trainer, way)()
    assert str(caught.value).endswith(f"all files are kept, to repeat: hfkd push '{folder}' {REPO}")
    assert "HTTP 503" in str(caught.value) and "\n" not in str(caught.value) and hub.token not in str(caught.value)
    assert not hub.commits(REPO)
    for k, where in STUDENTS.items():
        saved = AutoModelForImageClassification.from_pretrained(folder, **where).state_dict()
        trained = trainer.model.students[k].state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in saved.items())
    assert (folder / "README.md").is_file() and (folder / "modeling_wide_resnet.py").is_file()
    hub._faults.clear()
    publish.push_folder(folder, REPO, token=hub.token)
    assert "student_2/model.safetensors" in hub.files(REPO)


# -- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_token": None}, "no token for the Hub"),
        ({"hub_token": "hf_wrong"}, "HTTP 401"),
        ({"hub_token": "hf_reader"}, "the token may only read"),
        ({"hub_model_id": "stranger/cohort"}, "'stranger' is not a namespace of this token"),
        ({"hub_model_id": "tester/co hort"}, "'tester/co hort' is not a repo id"),
        ({"hub_model_id": "a/b/c"}, "'a/b/c' is not a repo id"),
        ({"hub_model_id": None}, "push_to_hub needs hub_model_id"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy=all_checkpoints would push optimizer states"),
        ({"endpoint": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_first_step(hub, tmp_path, monkeypatch, settings, message):
    settings = dict(settings)
    if endpoint := settings.pop("endpoint", None):
        monkeypatch.setattr(publish.huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(InputError) as caught:
        make_shared(tmp_path / "run", hub, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(settings.get("hub_token") or hub.token) not in str(caught.value)
    assert not (tmp_path / "run").exists() and not hub.repos
