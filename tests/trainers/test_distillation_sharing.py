"""Students of other kinds than their teachers, distilled and pushed: they load where hfkd is not installed."""

from types import SimpleNamespace

import pytest
from distillation_runs import tiny_trainer
from hub_metadata import check_card
from mixed_cohorts import StrangersView, expected, our_resnet, stock_vit
from test_sharing import default_hub
from tiny_runs import digit_sources


# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PAIRS = {"tester/convolutions": (our_resnet, stock_vit), "tester/transformer": (stock_vit, our_resnet)}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    base = tmp_path_factory.mktemp("pushed")
    view, students = StrangersView(), {}
    with pytest.MonkeyPatch.context() as monkeypatch, default_hub(monkeypatch, base) as hub:
        for repo, (student, teacher) in PAIRS.items():
            target = {"push_to_hub": True, "hub_model_id": repo, "hub_token": hub.token, "hub_strategy": "end"}
            kinds = {"student": student(), "teachers": teacher(), "sources": digit_sources(3)}
            folder = base / repo.split("/")[1]
            trainer = tiny_trainer(folder, ("kd", "attention"), **kinds, max_steps=2, dataset_name="digits", **target)
            trainer.train()
            trainer.evaluate()
            trainer.push_to_hub()
            students[repo] = trainer.model.students[0]
            view.load(repo, repo)
        files = {repo: hub.files(repo) for repo in PAIRS}
        (base / "stranger").mkdir()
        found = view.look(hub.environment(), base / "stranger")
    return SimpleNamespace(found=found, files=files, students=students, image=base / "stranger/image.png")


@pytest.mark.parametrize("repo", PAIRS)
def test_a_stranger_gets_the_student(pushed, repo):
    found = pushed.found[repo]
    assert "failed" not in found, found.get("failed")
    for key, value in expected(pushed.students[repo], pushed.image).items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("repo", PAIRS)
def test_nothing_of_the_teacher_is_pushed(pushed, repo):
    files = pushed.files[repo]
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    card = files["README.md"].decode()
    assert check_card(card) == ([], [])
    assert "| `loss` | `1 CE + 1 kd + 1000 attention` |" in card and "layers of attention" in card
