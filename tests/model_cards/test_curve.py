import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfkd.model_cards import plot_history


def history(steps: int, **values: float) -> list[dict[str, float]]:
    """A log in which every key falls from its value."""
    return [
        {"step": step, "epoch": step / 4, **{key: value / step for key, value in values.items()}}
        for step in range(1, steps + 1)
    ]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        return set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))


def test_each_kind_of_curve_gets_a_panel(tmp_path: Path) -> None:
    log = history(5, loss=2.0, student_0_ce=1.0, grad_norm=1.0, eval_runtime=1.0)
    one = plot_history(log, tmp_path / "one.png")
    two = plot_history(log + history(5, eval_student_0_accuracy=0.5), tmp_path / "two.png")
    three = plot_history(
        log + history(5, eval_ensemble_accuracy=1.0, discriminator_1_loss=0.5), tmp_path / "three.png"
    )
    assert one and two and three
    widths = [size(path)[0] for path in (one, two, three)]
    assert widths == [widths[0], 2 * widths[0], 3 * widths[0]]


def test_students_are_coloured_and_the_whole_is_black(tmp_path: Path) -> None:
    blue, orange = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)
    whole = plot_history(history(5, loss=1.0), tmp_path / "whole.png")
    pair = plot_history(history(5, eval_student_0_accuracy=1.0, eval_student_1_accuracy=0.8), tmp_path / "pair.png")
    assert whole and pair
    assert not {blue, orange} & colours(whole)
    assert {blue, orange} <= colours(pair)


@pytest.mark.parametrize("log", [[], [{"step": 1, "train_runtime": 3.0}], history(1, loss=1.0)])
def test_nothing_to_draw_is_no_picture(log: list[dict[str, float]], tmp_path: Path) -> None:
    assert plot_history(log, tmp_path / "curve.png") is None
    assert not (tmp_path / "curve.png").exists()


def test_without_matplotlib_there_is_one_warning_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        assert plot_history(history(3, loss=1.0), tmp_path / "curve.png") is None
    assert len(caplog.records) == 1 and "hfkd[plots]" in caplog.text
