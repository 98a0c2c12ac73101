import pytest
from tiny_classifiers import FAMILIES
from tiny_runs import tiny_resnet

from hfkd.models import build_image_processor
from hfkd.scripts.cli import main


@pytest.fixture
def cohort(tmp_path):
    """Two classifiers of one run, as they are saved."""
    for seed, (place, norm) in enumerate(((tmp_path, "none"), (tmp_path / "student_1", "batch"))):
        tiny_resnet(seed, norm=norm).save_pretrained(place)
        build_image_processor(8, 3, [0.5] * 3, [0.5] * 3).save_pretrained(place)
    return tmp_path


def test_prints_the_table_of_each_student(cohort, capsys):
    assert main(["exponents", str(cohort)]) == 0
    first, second = capsys.readouterr().out.split("student 1 (HfkdResNetForImageClassification)\n")
    assert first.startswith("student 0 (HfkdResNetForImageClassification)\n")
    rows = [line.split() for line in first.splitlines()]
    assert ["tensor", "shape", "lambda", "role"] in rows
    assert ["backbone.stem.0.weight", "16x1x3x3", "1/4", "core"] in rows
    assert ["classifier.bias", "10", "1", "above"] in rows
    rows = [line.split() for line in second.splitlines()]
    assert ["backbone.stages.1.0.branch.4.weight", "8", "1/2", "core"] in rows


def test_refuses_in_one_line(tmp_path, capsys):
    FAMILIES["convnext"]().save_pretrained(tmp_path)
    build_image_processor(32, 3, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path)
    assert main(["exponents", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "hfkd: error: module 'convnext.embeddings.layernorm' (ConvNextLayerNorm): layer_norm has no"
    )
    assert main(["exponents", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
