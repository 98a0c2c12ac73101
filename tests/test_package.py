"""The package as a whole: lazy import, public names, one-way imports, the README's words and commands."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hfkd


ROOT = Path(__file__).parents[1]
LAYERS = ("hfkd", "model_cards", "trainers", "scripts")  # each may import those before it


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_lazy_and_fast():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    assert run_python(f"import sys, hfkd; print({heavy})") == "set()"
    # Starting Python twice cancels what the machine does meanwhile; the least of three is the cost itself.
    code = "import time; t = time.perf_counter(); import hfkd; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("name", hfkd.__all__)
def test_public_names(name):
    assert getattr(hfkd, name) is not None
    assert name in dir(hfkd)


def test_unknown_name():
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        _ = hfkd.NoSuchTrainer


def test_auto_classes_are_registered_at_the_first_public_name():
    code = (
        "import hfkd; hfkd.build_student; from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('hfkd_resnet')).__name__)"
    )
    assert run_python(code) == "HfkdResNetConfig"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def layer_of(module):
    parts = module.split(".")
    if parts[0] != "hfkd":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "hfkd"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for path in (ROOT / layer).rglob("*.py"):
        if path == ROOT / "hfkd/__init__.py":
            continue  # names its public parts as text
        for module in imported(path):
            assert layer_of(module) in (None, *allowed), f"{path.relative_to(ROOT)} imports {module}"
            assert module.split(".")[0] not in LAYERS[1:], f"{path.relative_to(ROOT)} imports {module} as top level"
            assert module.split(".")[0] != "torchvision", f"{path.relative_to(ROOT)} needs torchvision"


def test_all_packages_are_shipped():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/__init__.py") if ".venv" not in path.parts
    }
    folders = {folder for folder in folders if folder.split("/")[0] in LAYERS}
    assert {p.replace(".", "/") for p in packages if p.startswith("hfkd")} == {
        folder if folder.startswith("hfkd") else f"hfkd/{folder}" for folder in folders
    }


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_examples_run(tmp_path, monkeypatch):
    """The Python examples, to the letter and one after the other, with fewer epochs."""
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert all(len(example.strip().splitlines()) <= 14 for example in examples)
    example = "".join(examples)
    monkeypatch.chdir(tmp_path)
    quick = re.sub(r"num_train_epochs=\d+", "num_train_epochs=2", example)
    assert quick != example
    done = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eval_student_1_accuracy" in done.stdout and "'eval_accuracy'" in done.stdout
    assert (tmp_path / "runs/digits/student_1/model.safetensors").is_file()


def test_readme_commands_exist(capsys):
    """Every `hfkd` line of the README parses: known command, known options, files that are there."""
    from hfkd.scripts.cli import main
    from hfkd.scripts.methods import find_method
    from hfkd.scripts.options import read_options
    from hfkd.scripts.study_file import read_study

    commands = re.findall(r"^hfkd (.*)$", README, flags=re.M)
    assert len(commands) >= 8
    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "train":
            method = find_method(words[1])
            read_options(method.dataclasses(), words[2:], "hfkd train", method.recipes)
        elif words[0] == "study":
            read_study(ROOT / words[1])
        else:
            assert main([words[0], "--help"]) == 0
            shown = capsys.readouterr().out
            for option in (word for word in words[1:] if word.startswith("--")):
                assert option in shown, f"hfkd {command}: no option {option}"
    for target in ("demo", "test"):
        assert f"make {target}" in README and f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_readme_shows_finished_studies_as_measured(path):
    """A study all of whose runs are in the results file has its table in the README, digit for digit."""
    from hfkd.scripts.report import make_table
    from hfkd.scripts.results import COLUMNS, read_csv
    from hfkd.scripts.study_file import read_study

    study = read_study(path)
    files = [ROOT / f"scripts/results/{stem}.csv" for stem in (study.method.stem, "comparison")]
    rows = [row for file in files for row in read_csv(file, COLUMNS)]
    runs = {(row["arm"], int(row["seed"])) for row in rows if row["recipe"] == study.name}
    if len(runs) == len(list(study.runs())):
        assert make_table(study, rows) in README
    else:
        assert study.name not in README  # no figure of an unfinished study
