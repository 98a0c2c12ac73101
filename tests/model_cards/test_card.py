import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from clean_process import run_clean
from hub_metadata import check_card
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainingArguments

from hfkd.hub.hardware import environment_report
from hfkd.hub.manifest import file_sha256
from hfkd.hub.publish import push_folder
from hfkd.hub.remote_code import student_folder, write_code
from hfkd.model_cards import (
    CardData,
    DataUsed,
    Method,
    Parent,
    Picture,
    Student,
    card,
    changed_settings,
    hub_id_or_none,
    measurements_of,
    render_card,
    write_card,
)
from hfkd.models import build_image_processor, build_student


# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Trainer:
    """The facts that a trainer class states."""

    _name = "Online adversarial distillation (AFD)"
    _paper = {"title": "Feature-map-level Online ...", "id": "2002.01775", "citation": "@inproceedings{chung2020afd}"}
    _tag_names = ["hfkd", "knowledge-distillation"]
    _template_file = "online_adversarial.md"


METRICS = {
    "eval_loss": 0.3,
    "eval_student_0_accuracy": 0.9622222,
    "eval_student_1_accuracy": 0.95,
    "eval_student_1_top5": 1,
    "eval_mean_accuracy": 0.9561111,
    "eval_ensemble_accuracy": 0.97,
    "eval_ensemble_prob_accuracy": float("nan"),
    "eval_runtime": 1.5,
}
HISTORY = tuple({"loss": 1 / step, "eval_student_0_accuracy": 1 - 1 / step, "step": step} for step in range(1, 6))
REPO = "tester/digits-pair"


@pytest.fixture
def data() -> CardData:
    return CardData(
        method=Method.of(Trainer),
        location="runs/digits-pair",
        students=(Student("resnet8", 77587, True), Student("vit", 1234, False)),
        data=DataUsed.of("digits", {"train": 1257, "test": 360}),
        license="apache-2.0",
        measurements=measurements_of(METRICS, "test"),
        hyperparameters={"learning_rate": 0.05, "lr_milestones": [10, 20]},
        environment=environment_report(),
        wall_time_s=3725.0,
        command="hfkd train online-adversarial --config hfkd_run.yaml",
    )


def replaced(card_data: CardData, /, **changes: object) -> ModelCard:
    return render_card(dataclasses.replace(card_data, **changes))


def test_numbers_that_are_not_finite_are_no_measurements() -> None:
    """The Hub refuses them."""
    for name in ("student_0_accuracy", "accuracy", "reconstruction_error", "elbo"):
        assert len(measurements_of({f"eval_{name}": 0.5}, "test")) == 1
        for value in (math.nan, math.inf):
            assert measurements_of({f"eval_{name}": value}, "test") == ()


@pytest.mark.parametrize(
    ("metrics", "ids"),
    [
        (METRICS, ["accuracy"]),
        ({"accuracy": 0.9, "top5_accuracy": 1.0}, ["accuracy"]),
        ({"reconstruction_error": 0.1, "elbo": -30.0}, ["mse"]),
        ({"mean_average_precision": 0.5, "mean_average_precision_11_point": 0.6}, None),
    ],
)
def test_metadata_names_metrics_of_the_hub_alone(
    data: CardData, metrics: dict[str, float], ids: list[str] | None
) -> None:
    """The others stand in the model-index, under their names."""
    measured = measurements_of(metrics, "test")
    read = replaced(data, measurements=measured).data
    assert read.metrics == ids
    assert len(read.eval_results) == len({result.metric_name for result in read.eval_results}) == len(measured)


def test_the_card_says_what_was_given(data: CardData) -> None:
    text = str(render_card(data))
    for part in (
        "# digits-pair\n",
        "2 image classifiers, trained together on `digits` with",
        "https://arxiv.org/abs/2002.01775",
        "| student 0 | resnet8 | 77,587 | root |",
        "| student 1 | vit | 1,234 | `student_1` |",
        'repo = "runs/digits-pair"',
        'classify = pipeline("image-classification", model=repo, trust_remote_code=True)',
        'model_kwargs={"subfolder": "student_1"}, trust_remote_code=True)',
        "On the test split (360 images):",
        "|  | Accuracy | Top-5 accuracy |",
        "| Student 0 | 0.9622 |  |",
        "| Ensemble (mean of logits) | 0.9700 |  |",
        "Data: `digits` (images: 1,257 train, 360 test).",
        "| `lr_milestones` | `[10, 20]` |",
        "Training time: 1 h 02 min",
        f"torch {torch.__version__}",
        "hfkd train online-adversarial --config hfkd_run.yaml",
        "No public code of the authors is known",
        "temperature T = 3",
        "found AFD below deep mutual learning (DML) in all seven",
        "attention-based feature distillation",
        "Feature-map-level Online ..., arXiv [2002.01775](https://arxiv.org/abs/2002.01775):",
        "```bibtex\n@inproceedings{chung2020afd}\n```",
    ):
        assert part in text, part


def test_the_card_has_no_gaps_and_no_unrendered_template(data: CardData) -> None:
    bare = CardData(data.method, "somewhere", data.students[:1])
    for text in (str(render_card(data)), str(render_card(bare))):
        assert "\n\n\n" not in text and "{{" not in text and "{%" not in text and "None" not in text
        assert text.endswith("\n") and not text.endswith("\n\n")
    assert "## Results" not in str(render_card(bare)) and "student_1" not in str(render_card(bare))


def test_the_metadata_comes_back_with_every_number(data: CardData, tmp_path: Path) -> None:
    path = write_card(data, tmp_path)
    read = ModelCard.load(path).data
    assert (read.license, read.library_name, read.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert {"hfkd", "knowledge-distillation", "arxiv:2002.01775"} <= set(read.tags)
    assert read.base_model is None and read.datasets is None
    assert read.model_name == "digits-pair"
    numbers = {result.metric_name: result.metric_value for result in read.eval_results}
    assert numbers == {
        "Accuracy, Student 0": 0.9622222,
        "Accuracy, Student 1": 0.95,
        "Top-5 accuracy, Student 1": 1.0,
        "Accuracy, Mean of the students": 0.9561111,
        "Accuracy, Ensemble (mean of logits)": 0.97,
    }
    assert {(result.dataset_name, result.dataset_split) for result in read.eval_results} == {("digits", "test")}
    assert check_card(path.read_text()) == ([], [])


def test_hub_parents_and_datasets_are_linked(data: CardData) -> None:
    parent = Parent.of("teacher", "google/vit-base-patch16-224")
    made = replaced(data, parents=(parent,), data=DataUsed.of("uoft-cs/cifar10", {}))
    assert made.data.base_model == [parent.hub_id] and made.data.datasets == ["uoft-cs/cifar10"]
    assert "Teacher: [google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224)" in made.text
    assert check_card(str(made)) == ([], [])


@pytest.mark.parametrize("relative", [False, True])
def test_local_parents_stand_in_the_body_with_their_weights_hash(
    data: CardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/teacher") if relative else tmp_path / "runs/teacher"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (tmp_path / "my/images").mkdir(parents=True)
    made = replaced(
        data, parents=(Parent.of("teacher", folder),), data=DataUsed.of(str(tmp_path / "my/images"), {"test": 2})
    )
    assert made.data.base_model is None and made.data.datasets is None
    assert f"`teacher` (local; model.safetensors sha256 `{file_sha256(folder / 'model.safetensors')}`)" in made.text
    assert str(tmp_path) not in str(made)
    assert check_card(str(made)) == ([], [])


def test_the_hub_would_refuse_a_local_parent_in_the_metadata(data: CardData) -> None:
    lying = Parent("teacher", "teacher", hub_id="/home/me/teacher")
    errors, _ = check_card(str(replaced(data, parents=(lying,))))
    assert errors == ['"base_model" with value "/home/me/teacher" is not valid. Use an id from https://hf.co/models.']


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("google/vit-base", "google/vit-base"),
        ("digits", None),
        ("a/b/c", None),
        ("/abs", None),
        ("./here", None),
        ("tests/model_cards", None),
        ("x/..", None),
    ],
)
def test_what_counts_as_a_hub_id(name: str, hub_id: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert hub_id_or_none(name) == hub_id


@pytest.mark.parametrize("section", [*card.SECTIONS, "metadata"])
def test_a_failing_section_is_left_out_with_one_warning(
    data: CardData, section: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: CardData) -> str:
        raise ZeroDivisionError("broken")

    if section == "metadata":
        monkeypatch.setattr(card, "_metadata", fail)
    else:
        monkeypatch.setitem(card.SECTIONS, section, fail)
    made = render_card(data)
    assert [record.getMessage() for record in caplog.records] == [
        f"model card: {section} is left out (ZeroDivisionError: broken)"
    ]
    assert "## Limits" in made.text and "\n\n\n" not in str(made) and made.data.library_name == "transformers"
    assert check_card(str(made)) == ([], [])


def test_a_failing_picture_costs_only_the_picture(
    data: CardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(card, "plot_history", fail)
    text = write_card(dataclasses.replace(data, log_history=HISTORY), tmp_path).read_text()
    assert "curve.png" not in text and "| Student 0 | 0.9622 |" in text
    assert "curve is left out (RuntimeError: no fonts)" in caplog.text


def test_pictures_are_shown_curve_first(data: CardData, tmp_path: Path) -> None:
    data = dataclasses.replace(data, log_history=HISTORY, pictures=(Picture("samples.png", "Samples"),))
    text = write_card(data, tmp_path).read_text()
    assert "![Training curves](curve.png)\n\n![Samples](samples.png)" in text
    assert (tmp_path / "curve.png").is_file()


def test_changed_settings_hold_what_was_changed_and_no_secrets() -> None:
    args = TrainingArguments(
        output_dir="runs/secret-place",
        learning_rate=0.05,
        lr_scheduler_type="cosine",
        hub_token="hf_secret",
        hub_model_id="me/model",
        run_name="mine",
        report_to=[],
    )
    assert changed_settings(args) == {"learning_rate": 0.05, "lr_scheduler_type": "cosine"}


def test_the_snippets_run_without_hfkd(hub: LoopbackHub, tmp_path: Path, data: CardData) -> None:
    folder = tmp_path / "runs" / "digits-pair"
    names = ["cat", "dog", "eel"]
    models = [build_student(name, class_names=names, image_size=8) for name in ("resnet8", "wrn_10_2")]
    for k, model in enumerate(models):
        model.save_pretrained(student_folder(folder, k))
        build_image_processor(8, 3, [0.5] * 3, [0.5] * 3).save_pretrained(student_folder(folder, k))
    write_code(models, folder)
    write_card(dataclasses.replace(data, students=tuple(map(Student.of, models))), folder)
    push_folder(folder, REPO, token=hub.token, endpoint=hub.endpoint)
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "image.png")

    cards = (folder / "README.md").read_text(), hub.files(REPO)["README.md"].decode()
    snippets = [re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in cards]
    assert [len(found) for found in snippets] == [2, 2]
    seen = "print(type(peer.model).__name__, type(model).__name__, repo)\n"
    # Both cards in one process: importing transformers is most of the time.
    code = "".join("".join(found) + seen for found in snippets)
    out = run_clean(code, hub.environment(token=None), tmp_path)
    answers = re.findall(r"^\[\{.*\}\]$", out, re.MULTILINE)
    assert len(answers) == 2 and all(name in answer for name in names for answer in answers)
    loaded = "HfkdWideResNetForImageClassification HfkdResNetForImageClassification"
    assert [line for line in out.splitlines() if "Hfkd" in line] == [f"{loaded} runs/digits-pair", f"{loaded} {REPO}"]
