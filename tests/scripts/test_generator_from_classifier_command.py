"""`hfkd train generator-from-classifier`: from a saved classifier and no data option to a generator with its card."""

import json
import os

import pytest
from classifier_runs import processor, tiny_mlp
from clean_process import run_clean
from hub_metadata import check_card
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from hfkd.hub.manifest import file_sha256
from hfkd.scripts.cli import main


QUICK = ["--max_steps", "4", "--warmup_updates", "2", "--per_device_train_batch_size", "16", "--use_cpu", "true"]
QUICK += ["--per_device_eval_batch_size", "32", "--disable_tqdm", "true", "--save_strategy", "epoch"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Folders of two classifiers, of four and of three classes."""
    folders = []
    for number, classes in enumerate((["cat", "dog", "eel", "fox"], ["gnu", "hen", "ibis"])):
        model = tiny_mlp(number, len(classes))
        model.config.id2label = dict(enumerate(classes))
        folders.append(tmp_path_factory.mktemp("classifiers") / f"animals-{number}")
        model.save_pretrained(folders[-1])
        processor().save_pretrained(folders[-1])
    return folders


def train(folder, *options):
    return main(["train", "generator-from-classifier", *QUICK, "--output_dir", str(folder), *map(str, options)])


def test_trains_measures_and_leaves_a_card_that_runs(classifiers, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(folder, "--config", "digits", "--classifiers", classifiers[0], "--latent_size", 7) == 0
    printed = capsys.readouterr().out
    assert "on 32 fixed draws" in printed and "  sqrt_stationarity" in printed and "  self_accuracy" in printed
    results = json.loads((folder / "test_results.json").read_text())
    assert {"loss", "sqrt_stationarity", "duality", "self_accuracy"} == results["metrics"].keys()
    assert (results["n_train"], results["n_test"]) == (0, 32)
    generator = AutoModel.from_pretrained(folder)
    assert generator.config.class_names() == ["cat", "dog", "eel", "fox"] and generator.config.latent_size == 7
    assert not (folder / "preprocessor_config.json").exists()
    assert "dataset_name" not in (folder / "run.yaml").read_text()

    card = ModelCard.load(folder / "README.md")
    assert check_card(card.content) == ([], [])
    assert card.data.pipeline_tag == "unconditional-image-generation" and card.data.eval_results is None
    assert "datasets" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    digest = file_sha256(classifiers[0] / "model.safetensors")
    assert f"Classifier: `animals-0` (local; model.safetensors sha256 `{digest}`)" in card.text
    assert str(classifiers[0]) not in card.text and "Privacy:" in card.text and "Ours, as the paper's" in card.text
    assert "| `margin` | `10.0` |" in card.text
    # Four rows of ten images of eight pixels, enlarged to 32, with a line between.
    assert Image.open(folder / "samples.png").size == (10 * 33 - 1, 4 * 33 - 1)
    code = card.text.split("```python\n")[1].split("```")[0] + "\nprint(tuple(images.shape))"
    printed = run_clean(code, {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, tmp_path)
    assert printed.split("\n")[-2] == "(10, 1, 8, 8)"
    assert Image.open(tmp_path / "sample.png").size == (8, 8)


def test_several_classifiers_and_the_run_again_from_its_file(classifiers, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = [
        "--latent_size",
        70,
        "--latent_skip",
        "true",
        "--hidden_sizes",
        16,
        16,
        128,
        "--classifiers_per_step",
        "one",
    ]
    assert train(first, "--classifiers", *classifiers, *options) == 0
    assert (
        main(["train", "generator-from-classifier", "--config", str(first / "run.yaml"), "--output_dir", str(second)])
        == 0
    )
    generator = AutoModel.from_pretrained(first)
    assert generator.config.class_counts == [4, 3] and generator.config.latent_skip
    assert generator.config.class_names(1) == ["gnu", "hen", "ibis"] and generator.config.hidden_sizes == [16, 16, 128]
    assert file_sha256(first / "model.safetensors") == file_sha256(second / "model.safetensors")
    text = (first / "README.md").read_text()
    assert "Classifier: `animals-0`" in text and "Classifier: `animals-1`" in text
    assert "row for each class of classifier 1](samples_1.png)" in text and (first / "samples_1.png").is_file()


def headless(classifiers, tmp_path):
    """A checkpoint of the backbone alone."""
    tiny_mlp().base_model.save_pretrained(tmp_path / "backbone")
    processor().save_pretrained(tmp_path / "backbone")
    return ["--classifiers", tmp_path / "backbone"]


def of_another_size(classifiers, tmp_path):
    larger = processor()
    larger.size = {"height": 10, "width": 10}
    tiny_mlp(image_size=10).save_pretrained(tmp_path / "larger")
    larger.save_pretrained(tmp_path / "larger")
    return ["--classifiers", tmp_path / "larger"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda c, t: [], "give --classifiers FOLDER_OR_HUB_ID"),
        (lambda c, t: ["--classifiers", c[0], "--dataset_name", "digits"], "unknown option '--dataset_name'"),
        (lambda c, t: ["--classifiers", t / "nothing"], "nothing' is not a folder"),
        (lambda c, t: ["--classifiers", c[0], "--latent_size", 0], "latent_size=0"),
        (lambda c, t: ["--classifiers", c[0], "--latent_skip", "true", "--latent_size", 63], "latent_size=63"),
        (lambda c, t: ["--classifiers", c[0], "--hidden_sizes", 7], "hidden_sizes[-1]=7"),
        (headless, "was saved without classifier.bias: give a trained classifier"),
        (of_another_size, "image_size=10 has no generator"),
        (lambda c, t: [*of_another_size(c, t), c[0]], "one generator makes images of one kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # workers must agree on names, and addresses differ
)
def test_bad_input_is_one_line(options, message, classifiers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = train(tmp_path / "run", *options(classifiers, tmp_path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("hfkd: error:") and message in error
    assert not (tmp_path / "run").exists()
