import dataclasses
from pathlib import Path

import pytest
import yaml

from hfkd.data import DataArguments
from hfkd.errors import InputError
from hfkd.scripts.cohort import CohortArguments
from hfkd.scripts.options import build, check_values, read_options, resolved, write_run_file
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig


KINDS = [CohortArguments, DataArguments, OnlineAdversarialConfig]


def read(*argv: str, recipes: Path | None = None) -> dict:
    return read_options(KINDS, argv, "hfkd train online-adversarial", recipes)


def write(folder: Path, text: str, name: str = "options.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_over_yaml_over_defaults(tmp_path):
    config = write(tmp_path, "learning_rate: 0.05\nstudents: [resnet14, resnet8]\nseed: 7\n")
    values = read("--config", config, "--seed", "8", "--bf16")
    assert values == {"learning_rate": 0.05, "students": ["resnet14", "resnet8"], "seed": 8, "bf16": True}
    cohort, data, _ = build(KINDS, {**values, "bf16": False})
    assert (cohort.students, cohort.teacher, data.dataset_name) == (["resnet14", "resnet8"], None, "digits")


def test_an_option_given_at_its_default_still_beats_yaml(tmp_path):
    config = write(tmp_path, "temperature: 5.0\n")
    assert read("--config", config, "--temperature", "3.0") == {"temperature": 3.0}


def test_shipped_recipes_are_found_by_name(tmp_path):
    write(tmp_path, "seed: 3\n", "small.yaml")
    assert read("--config", "small", recipes=tmp_path) == {"seed": 3}
    with pytest.raises(InputError, match=r"--config smal: .*did you mean 'small'.*shipped recipes: small"):
        read("--config", "smal", recipes=tmp_path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),  # a text in YAML 1.1
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("eval_strategy: no\nlogging_strategy: no", None),  # false in YAML 1.1
        ("logging_strategy: steps", {"logging_strategy": "steps"}),
        ("augmentation: none", {"augmentation": "none"}),
        ("augmentation: null", {"augmentation": None}),
        ("lr_milestones: [0.5, 1]", {"lr_milestones": [0.5, 1.0]}),
        ("lr_milestones: []", {"lr_milestones": []}),
        ("", {}),
    ],
)
def test_yaml_values_of_the_right_type(tmp_path, text, values):
    config = write(tmp_path, text)
    if values is None:
        with pytest.raises(InputError, match=r"eval_strategy: False is not a text \(YAML reads yes, no"):
            read("--config", config)
    else:
        assert read("--config", config) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast", "learning_rate: 'fast' is not a number"),
        ("learning_rate: true", "learning_rate: True is not a number"),
        ("max_steps: 2.5", "max_steps: 2.5 is not a whole number"),
        ("max_steps: true", "max_steps: True is not a whole number"),
        ("bf16: 1", "bf16: 1 is not true or false"),
        ("students: resnet8", "students: 'resnet8' is not a list .* of a text"),
        ("students: [resnet8, 8]", "students: .* is not a list"),
        ("augmentation: cropp", "augmentation: 'cropp' is not one of 'none', .* or null"),
        ("dataset_name: 3", "dataset_name: 3 is not a text"),
        ("learning_rat: 1", "unknown option 'learning_rat' .did you mean 'learning_rate'"),
        ("- a list", "needs lines of the form"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_that_names_file_and_value(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read("--config", write(tmp_path, text))
    assert "options.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown option '--learning_rat' .did you mean '--learning_rate'"),
        (["--learning_rat=1"], "unknown option '--learning_rat'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--learning_rate"], "expected one argument"),
        (["fast"], "unexpected argument 'fast'"),
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml: cannot be read .No such file"),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(InputError, match=message):
        read(*argv)


def test_what_a_dataclass_refuses_is_one_line():
    with pytest.raises(InputError, match="momentum=1.5 is out of range"):
        build(KINDS, {"momentum": 1.5})
    with pytest.raises(InputError, match="not a valid IntervalStrategy") as caught:
        build(KINDS, {"logging_strategy": "sometimes"})
    assert "\n" not in str(caught.value)


def test_run_file_repeats_the_run(tmp_path):
    values = {"learning_rate": 0.3, "students": ["resnet14", "resnet8"], "save_strategy": "steps", "save_steps": 5}
    values |= {"output_dir": str(tmp_path), "hub_token": "hf_secret", "push_to_hub": True, "hub_model_id": "me/x"}
    values |= {"resume_from_checkpoint": "true"}
    write_run_file(tmp_path, "online-adversarial", resolved(KINDS, values))
    text = (tmp_path / "run.yaml").read_text()
    assert "hf_secret" not in text
    assert (
        not {"output_dir", "hub_token", "push_to_hub", "hub_model_id", "resume_from_checkpoint"}
        & yaml.safe_load(text).keys()
    )
    again = read("--config", str(tmp_path / "run.yaml"))
    private = {"output_dir", "hub_token", "push_to_hub", "hub_model_id", "resume_from_checkpoint"}
    first, second = (build(KINDS, {k: v for k, v in x.items() if k not in private}) for x in (values, again))
    assert [dataclasses.asdict(kind) for kind in first] == [dataclasses.asdict(kind) for kind in second]


def test_run_file_keeps_a_value_that_only_transformers_has_as_its_default():
    # save_strategy: steps is TrainingArguments' default, but epoch is ours.
    assert resolved(KINDS, {"save_strategy": "steps"})["save_strategy"] == "steps"
    assert "logging_steps" not in resolved(KINDS, {})


def test_check_values_accepts_what_resolved_gives():
    options = resolved(KINDS, {})
    assert check_values(options, KINDS, "defaults") == options
