import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hfkd.errors import InputError
from hfkd.hub.manifest import MANIFEST_NAME, atomic_folder, is_valid, sweep_leftovers, verify_manifest, write_manifest


FILES = {"config.json": "{}", "model.safetensors": "weights", "student_1/config.json": "{'peer': 1}"}

# Saves over the folder given on the command line and kills itself before the n-th change to the file system.
KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from hfkd.hub.manifest import atomic_folder

target, budget = Path(sys.argv[1]), int(sys.argv[2])
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def kill_at_budget(event, arguments):
    global budget
    if event in CHANGES:
        budget -= 1
        if budget < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_at_budget)
with atomic_folder(target) as folder:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("new")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    fill(folder)
    write_manifest(folder)
    return folder


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_manifest_lists_every_file_with_size_and_hash(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert {entry["name"]: entry["size"] for entry in listed} == {name: len(text) for name, text in FILES.items()}
    assert all(len(entry["sha256"]) == 64 for entry in listed)
    verify_manifest(folder)
    assert is_valid(folder)


def test_files_added_after_the_manifest_do_not_invalidate_it(folder: Path) -> None:
    (folder / "README.md").write_text("later")
    assert is_valid(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "longer", "same size"])
def test_damage_is_found_and_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(FILES[name] + "!" if damage == "longer" else FILES[name][:-1] + "!")
    with pytest.raises(InputError) as caught:
        verify_manifest(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not is_valid(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": [{"name": "config.json"}]}', "\xff\xfe"])
def test_an_unreadable_manifest_is_an_input_error(folder: Path, content: str) -> None:
    (folder / MANIFEST_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=MANIFEST_NAME):
        verify_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    listed = {"files": [{"name": "../secret", "size": 1, "sha256": "0"}]}
    (folder / MANIFEST_NAME).write_text(json.dumps(listed))
    with pytest.raises(InputError, match="outside the folder"):
        verify_manifest(folder)


def test_a_folder_without_a_manifest_is_not_valid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its save never ended"):
        verify_manifest(tmp_path)
    assert not is_valid(tmp_path / "nowhere")


def test_atomic_folder_replaces_an_older_one_as_a_whole(folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        assert is_valid(folder) and temporary.parent == folder.parent
        (temporary / "config.json").write_text("new")
    assert {path.name for path in folder.iterdir()} == {"config.json", MANIFEST_NAME}
    assert is_valid(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_changes_nothing(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text("half")
        raise ZeroDivisionError
    assert is_valid(folder) and (folder / "model.safetensors").read_text() == FILES["model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_that_safetensors_cannot_write_is_an_os_error(folder: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"), atomic_folder(folder) as temporary:
        save_file({"weight": torch.zeros(1)}, temporary / "missing" / "model.safetensors")
    assert is_valid(folder)


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError), atomic_folder(tmp_path / "file" / "checkpoint-4"):
        pass
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("replacing", [False, True], ids=["first save", "replacing"])
def test_kill_inside_the_save_leaves_the_old_folder_the_new_one_or_none(tmp_path: Path, replacing: bool) -> None:
    outcomes = set()
    for budget in range(100):
        parent = tmp_path / str(budget)
        target = parent / "checkpoint-4"
        parent.mkdir()
        if replacing:
            fill(target)
            write_manifest(target)
        command = [sys.executable, "-c", KILLED_SAVE, str(target), str(budget)]
        code = subprocess.run(command, check=False).returncode
        assert code in (0, -signal.SIGKILL)
        outcomes.add(state(target))
        sweep_leftovers(parent)
        assert state(target) != "none" or not replacing
        assert {path.name for path in parent.iterdir()} <= {target.name}
        if code == 0:
            break
    else:
        pytest.fail("the save was killed a hundred times and never ended")
    assert outcomes == {"none", "new", "old"} if replacing else {"none", "new"}


def state(target: Path) -> str:
    if not target.exists():
        return "none"
    verify_manifest(target)
    return "new" if (target / "config.json").read_text() == "new" else "old"


def test_sweep_restores_a_folder_whose_replacement_was_cut_off(folder: Path) -> None:
    folder.rename(folder.with_name(f".old-{folder.name}-1a2b3c4d"))
    fill(folder.with_name(f".tmp-{folder.name}-1a2b3c4d"))
    sweep_leftovers(folder.parent)
    assert is_valid(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
