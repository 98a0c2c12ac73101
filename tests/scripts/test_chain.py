"""`hfkd chain`: the shipped closed loop with few updates, stopped on the way; and files that are refused."""

import json
import os
import signal

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForImageClassification

from hfkd.hub.manifest import file_sha256
from hfkd.scripts import chain
from hfkd.scripts.chain_file import CHAINS, find_chain, read_chain
from hfkd.scripts.cli import main
from hfkd.scripts.methods import find_method
from hfkd.scripts.options import build, check_values, read_yaml
from hfkd.trainers.squeeze_and_span import SqueezeAndSpanTrainer


COMMON = {"use_cpu": True, "logging_steps": 1}
HEADS = {"representation_size": 16, "squeeze_hidden_size": 16, "projector_layers": 2}
STUDENT = {**COMMON, **HEADS, "per_device_train_batch_size": 40, "save_strategy": "no"}
FEW_UPDATES = {
    "classifier": {**COMMON, "max_steps": 40, "hidden_sizes": [16, 16]},
    "generator": {**COMMON, "max_steps": 10, "hidden_sizes": [16, 16, 64], "per_device_eval_batch_size": 64},
    "student": {**STUDENT, "num_train_epochs": 0.05},  # two updates
    "untrained": STUDENT,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    steps = read_yaml(CHAINS / "closed_loop_digits.yaml")["steps"]
    for step in steps:
        step["options"] = {**step.get("options", {}), **FEW_UPDATES.get(step["name"], {})}
    path = tmp_path_factory.mktemp("file") / "loop.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}))
    return path


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    """Of the chain, which a signal stopped in its third step and which was then run again."""
    folder = tmp_path_factory.mktemp("chain") / "loop"
    original = SqueezeAndSpanTrainer.method_step

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqueezeAndSpanTrainer, "method_step", stopped)
        assert run(file, folder) == 143
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["classifier", "generator", "student"]
    before = (folder / "generator/model.safetensors").stat().st_mtime_ns
    assert run(file, folder) == 0
    assert (folder / "generator/model.safetensors").stat().st_mtime_ns == before
    return folder


def run(file, folder):
    return main(["chain", str(file), "--output_dir", str(folder)])


def results(folder, name):
    return json.loads((folder / name).read_text())


def test_a_stopped_chain_goes_on_where_it_stopped(folder):
    assert results(folder, "classifier/test_results.json")["wall_s"] is not None
    assert results(folder, "student/test_results.json")["wall_s"] is None  # went on with its checkpoint
    assert (folder / "student/checkpoint-1").is_dir()


def test_every_card_names_its_parent(folder):
    parents = {
        "generator": "classifier",
        "student": "generator",
        "probe": "student",
        "probe_of_untrained": "untrained",
    }
    for node, parent in parents.items():
        card = (folder / node / "README.md").read_text()
        weights = file_sha256(folder / parent / "model.safetensors")
        assert f": `{parent}` (local; model.safetensors sha256 `{weights}`)" in card, node


def test_the_random_backbone_is_what_the_student_started_from(folder):
    kinds = find_method("squeeze-and-span").dataclasses()
    options = check_values(read_yaml(folder / "student/run.yaml"), kinds, "run.yaml") | {"output_dir": str(folder)}
    setup, data, config = build(kinds, options)
    first = find_method("squeeze-and-span").load("build")(config, data, setup).trainer.model.students[0].state_dict()
    saved, trained = (AutoModel.from_pretrained(folder / name).state_dict() for name in ("untrained", "student"))
    assert all(torch.equal(value, saved[name]) for name, value in first.items())
    assert not all(torch.equal(value, trained[name]) for name, value in first.items())


def test_both_probes_are_reported_and_loadable(file, folder, capsys, monkeypatch):
    monkeypatch.setattr(chain.train, "run", lambda words: pytest.fail("all trainings are finished"))
    monkeypatch.setattr(chain.evaluate, "run", lambda words: pytest.fail("all evaluations are finished"))
    assert run(file, folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[1/6] classifier: finished before", "[2/6] generator: finished before"]
    for name, backbone in (("probe", "student"), ("probe_of_untrained", "untrained")):
        share = results(folder, f"{name}.json")["metrics"]["student_0_accuracy"]
        (line,) = [line for line in lines if line.split()[0] == name]
        assert f"linear-probe of {backbone}: student 0 {100 * share:.2f} ± " in line
        model = AutoModelForImageClassification.from_pretrained(folder / name)
        assert model.config.num_labels == 10


def test_an_evaluation_that_was_cut_off_is_made_anew(file, folder, capsys):
    result = folder / "probe.json"
    before = result.read_text()
    result.unlink()  # the folder with the classifier is there already
    assert run(file, folder) == 0
    assert "[4/6] untrained: finished before\n[5/6] probe: hfkd evaluate" in capsys.readouterr().out
    assert result.read_text() == before


def test_other_options_are_not_mixed_in(file, folder, tmp_path, capsys):
    content = read_yaml(file)
    content["steps"][2]["options"]["learning_rate"] = 0.5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    assert run(tmp_path / "other.yaml", folder) == 2
    error = capsys.readouterr().err
    assert "step 'student' was started with other options" in error and "'learning_rate: 0.5' differs" in error


def test_what_was_made_from_something_that_is_gone_is_refused(file, folder, capsys):
    path = folder / "generator/test_results.json"
    path.rename(path.with_suffix(".away"))
    try:
        assert run(file, folder) == 2
    finally:
        path.with_suffix(".away").rename(path)
    assert "step 'student' is finished and was made from 'generator', which is not" in capsys.readouterr().err


def write(folder, *steps):
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"steps": list(steps)}))
    return path


TRAIN = {"name": "one", "train": "max-margin"}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "a chain has one, steps"),
        (["train"], "step 1: 'train' is not a mapping"),
        ([{**TRAIN, "recipe": "digits"}], "step 1 (one): unknown key 'recipe'"),
        ([{**TRAIN, "name": "../one"}], "names a folder"),
        ([{"name": "one"}], "needs either train: METHOD or evaluate: CHECKPOINT"),
        ([{**TRAIN, "train": "max-margn"}], "unknown method 'max-margn' (did you mean 'max-margin'?)"),
        ([{**TRAIN, "config": "digit"}], "neither a file nor a shipped recipe (did you mean 'digits'?)"),
        ([{**TRAIN, "options": {"learning_rat": 1}}], "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ([{**TRAIN, "options": {"learning_rate": "fast"}}], "learning_rate: 'fast' is not"),
        ([{**TRAIN, "options": {"learning_rate": -1.0}}], "step 1 (one): learning_rate=-1.0"),
        ([{**TRAIN, "options": {"output_dir": "x"}}], "output_dir is set by the chain itself"),
        ([TRAIN, TRAIN], "step 2 (one): an earlier step is called 'one' too"),
        ([TRAIN, {"name": "two", "evaluate": "${on}"}], "${on} is no step up to here (did you mean 'one'?)"),
        ([{"name": "zero", "evaluate": "${one}"}, TRAIN], "step 1 (zero): ${one} is no step up to here"),
    ],
)
def test_a_chain_that_cannot_work_is_refused_before_its_first_step(steps, message, tmp_path, capsys):
    assert run(write(tmp_path, *steps), tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_is_named(tmp_path, capsys):
    step = {"name": "two", "evaluate": str(tmp_path / "nowhere")}
    assert run(write(tmp_path, step), tmp_path / "out") == 2
    assert f"hfkd: error: step 'two': checkpoint '{tmp_path}/nowhere' is not a folder" in capsys.readouterr().err
    # It may be mended, as nothing was made with it.
    assert run(write(tmp_path, {**step, "evaluate": str(tmp_path / "elsewhere")}), tmp_path / "out") == 2
    assert "elsewhere' is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", [path.stem for path in CHAINS.glob("*.yaml")])
def test_shipped_chains_are_valid(name):
    steps = read_chain(find_chain(name))
    assert [step.name for step in steps][-2:] == ["probe", "probe_of_untrained"]
    student, untrained = (step.options for step in steps[2:4])
    assert student["synthetic_share"] == 1 and untrained["num_train_epochs"] == 0
    differing = {name for name in student if student[name] != untrained[name]}
    assert differing == {"num_train_epochs", "save_strategy"}


def test_an_unknown_chain_is_answered_with_the_shipped_ones(capsys):
    assert main(["chain", "closed_loop_digit"]) == 2
    assert "(did you mean 'closed_loop_digits'?)" in capsys.readouterr().err
