import json
import sys
from pathlib import Path

import pytest
import torch
from clean_process import run_clean
from loopback_hub import LoopbackHub
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from hfkd.errors import InputError
from hfkd.hub.publish import push_folder
from hfkd.hub.remote_code import student_folder, write_code
from hfkd.models import build_image_processor, build_student


# huggingface_hub 2.4 itself still uploads with data=, which its httpx2 wants called content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMES = ["cat", "dog", "eel"]
REPO = "tester/mixed"

# Loads every student in each of the ways that the cards promise, and prints its logits by the way of loading.
LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
image = Image.new("RGB", (8, 8), (200, 30, 30))
found = {}
for repo in PLACES:
    for k in range(3):
        sub = {"subfolder": f"student_{k}"} if k else {}
        model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True, **sub)
        found[f"{repo} auto {k}"] = model.eval()(pixel_values=pixels).logits[0].tolist()
        assert AutoImageProcessor.from_pretrained(repo, **sub).size["height"] == 8
        kind = "image-classification"
        classify = pipeline(kind, model=repo, model_kwargs=sub, trust_remote_code=True)
        found[f"{repo} pipeline {k}"] = classify.model(pixel_values=pixels).logits[0].tolist()
        assert {answer["label"] for answer in classify(image)} == {"cat", "dog", "eel"}
    if repo.startswith("/"):
        for k in (1, 2):
            model = AutoModelForImageClassification.from_pretrained(f"{repo}/student_{k}", trust_remote_code=True)
            found[f"{repo} folder {k}"] = model.eval()(pixel_values=pixels).logits[0].tolist()
assert not [name for name in sys.modules if name.startswith("hfkd.")]
print(json.dumps(found))
"""


def tiny_vit() -> PreTrainedModel:
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: k for k, name in enumerate(NAMES)}}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes, **labels))


def students() -> list[PreTrainedModel]:
    ours = [build_student(name, class_names=NAMES, image_size=8) for name in ("resnet8", "wrn_10_2")]
    return [*ours, tiny_vit()]


def save(models: list[PreTrainedModel], folder: Path) -> list[Path]:
    for k, model in enumerate(models):
        model.save_pretrained(student_folder(folder, k))
        build_image_processor(8, 3, [0.5] * 3, [0.5] * 3).save_pretrained(student_folder(folder, k))
    return write_code(models, folder)


def test_code_lies_at_the_root_and_beside_each_config(tmp_path: Path) -> None:
    written = save(students(), tmp_path)
    code = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")}
    assert {path.relative_to(tmp_path).as_posix() for path in written} == code
    assert {"modeling_resnet.py", "modeling_wide_resnet.py", "student_1/modeling_wide_resnet.py"} <= code
    assert not list(student_folder(tmp_path, 2).glob("*.py"))


@pytest.mark.parametrize("first", ["hfkd first", "stock first"])
def test_a_mixed_cohort_loads_without_hfkd(hub: LoopbackHub, tmp_path: Path, first: str) -> None:
    models = students() if first == "hfkd first" else students()[::-1]
    folder = tmp_path / "mixed.run-1"
    save(models, folder)
    push_folder(folder, REPO, token=hub.token, endpoint=hub.endpoint)
    hub.requests.clear()
    out = run_clean(LOAD.replace("PLACES", repr([REPO, str(folder)])), hub.environment(token=None), tmp_path)

    pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    with torch.no_grad():
        expected = [model.eval()(pixel_values=pixels).logits[0] for model in models]
    found = json.loads(out.splitlines()[-1])
    assert len(found) == 2 * 3 * 2 + 2
    for way, logits in found.items():
        torch.testing.assert_close(torch.tensor(logits), expected[int(way[-1])], rtol=1e-5, atol=1e-6)
    assert any(path.endswith("/model.safetensors") for _, path in hub.requests)


def test_remote_code_is_refused_without_the_users_consent(hub: LoopbackHub, tmp_path: Path) -> None:
    save(students(), tmp_path / "run")
    push_folder(tmp_path / "run", REPO, token=hub.token, endpoint=hub.endpoint)
    code = f"""
from transformers import AutoModelForImageClassification
try:
    AutoModelForImageClassification.from_pretrained({REPO!r}, trust_remote_code=False)
except ValueError as error:
    print("refused" if "trust_remote_code" in str(error) else error)
"""
    assert run_clean(code, hub.environment(token=None), tmp_path).splitlines()[-1] == "refused"


def test_two_students_with_different_files_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = students()[:2]
    files = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        files.append(tmp_path / str(k) / "modeling_wide_resnet.py")
        files[-1].write_text(f"VERSION = {k}\n")
    monkeypatch.setattr(sys.modules["hfkd.models"], "code_files", lambda model: [files[models.index(model)]])
    with pytest.raises(InputError, match="modeling_wide_resnet.py: two students bring different"):
        for model in models:
            model.config.auto_map = {}
        save(models, tmp_path / "run")


def test_a_config_that_names_code_nobody_brought_is_refused(tmp_path: Path) -> None:
    model = students()[2]
    model.config.auto_map = {"AutoModelForImageClassification": "modeling_lost.LostModel"}
    with pytest.raises(InputError, match="needs modeling_lost.py"):
        save([model], tmp_path / "run")
