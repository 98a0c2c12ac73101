import math
from dataclasses import replace

import pytest

from hfkd.errors import InputError
from hfkd.scripts.methods import METHODS
from hfkd.scripts.orderings import read_orderings
from hfkd.scripts.report import collect, duration, make_table, write_report
from hfkd.scripts.results import COLUMNS, append_csv, exclusive, read_csv
from hfkd.scripts.study_file import Arm, Study


ARM = Arm(METHODS["online_adversarial"], {}, seeds=[0, 1, 2])
STUDY = Study(
    name="toy",
    method=ARM.method,
    arms={"vanilla": ARM, "afd": ARM},
    reference="vanilla",
    metrics=["mean_accuracy", "maps_0_1_l1"],
)
VALUES = {"vanilla": [0.80, 0.81, 0.82], "afd": [0.81, 0.83, 0.82]}


def make_rows(values=VALUES, **changes):
    shared = dict.fromkeys(COLUMNS, "") | {"recipe": "toy", "dataset": "digits", "n_test": "1597"}
    return [
        {**shared, "arm": arm, "seed": str(seed), "metric": metric, "value": repr(value * factor), **changes}
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
        for metric, factor in (("mean_accuracy", 1), ("maps_0_1_l1", 0.5))
    ]


def test_table_of_means_and_paired_differences():
    table = make_table(STUDY, make_rows()).splitlines()
    assert table[0] == "| arm | seeds | mean_accuracy (%) | minus vanilla | maps_0_1_l1 | minus vanilla |"
    error, margin = 1 / math.sqrt(3), 4.302653 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert table[2].startswith(f"| vanilla | 3 | 81.00 ± {error:.2f} | — | 0.4050 ± 0.0029 | — |")
    assert table[3].startswith(f"| afd | 3 | 82.00 ± 0.58 | +1.00 [{1 - margin:.2f}, +{1 + margin:.2f}] |")


def test_only_the_study_s_own_rows_count():
    rows = make_rows() + make_rows(recipe="other") + make_rows(arm="stray") + make_rows(seed="7")
    assert collect(STUDY, rows, "mean_accuracy") == collect(STUDY, make_rows(), "mean_accuracy")


def test_differences_pair_the_seeds_that_both_arms_have():
    table = make_table(STUDY, make_rows({"vanilla": [0.80, 0.81], "afd": [0.90]}))
    assert "| afd | 1 | 90.00 | +10.00 |" in table


def test_arms_have_their_own_seeds():
    study = replace(STUDY, arms={"vanilla": ARM, "afd": replace(ARM, seeds=[1])})
    assert study.seeds == [0, 1, 2]
    assert [(run.arm, run.seed) for run in study.runs()] == [
        ("vanilla", 0),
        ("vanilla", 1),
        ("afd", 1),
        ("vanilla", 2),
    ]
    assert collect(study, make_rows(), "mean_accuracy")["afd"] == {1: 0.83}


def test_an_arm_without_a_metric_has_a_dash_there(tmp_path):
    rows = [row for row in make_rows() if row["arm"] == "vanilla" or row["metric"] == "mean_accuracy"]
    assert make_table(STUDY, rows).splitlines()[3].endswith("| +1.00 [-1.48, +3.48] | — | — |")
    first = replace(STUDY, metrics=STUDY.metrics[::-1])
    table = make_table(first, rows).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| vanilla", "| afd"]
    assert table[3].startswith("| afd | 3 | — | — | 82.00 ± 0.58 |")
    write_report(first, rows, tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_metric_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mean_accuracy'"):
        collect(STUDY, make_rows(), "mean_acuracy")


def test_report_files_and_words(tmp_path):
    text = write_report(STUDY, make_rows(), tmp_path)
    assert "afd is 1.00 points above vanilla, ± 2.48 at 95 % confidence: no difference is shown" in text
    assert "1597 test images" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (119, "2 min"), (3900, "1 h 05 min"), (3599, "1 h 00 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rows_are_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.csv"
    append_csv(path, COLUMNS, make_rows())
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            append_csv(path, COLUMNS, make_rows(recipe="second"))
    assert path.read_bytes() == before
    append_csv(path, COLUMNS, make_rows(recipe="with, comma"))
    assert [row["recipe"] for row in read_csv(path, COLUMNS)] == ["toy"] * 12 + ["with, comma"] * 12


def test_rows_with_a_known_key_are_left_out(tmp_path):
    path = tmp_path / "results.csv"
    for _ in range(2):
        append_csv(path, COLUMNS, make_rows(), key=("recipe", "arm", "seed", "metric"))
    assert len(read_csv(path, COLUMNS)) == 12


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="instead of recipe"):
        read_csv(path, COLUMNS)


def test_the_lock_ends_with_the_block(tmp_path):
    with exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_orderings_of_a_paper_are_checked(tmp_path):
    orderings = read_orderings(["afd > vanilla", "vanilla ~ logit-only"], ["vanilla", "logit-only", "afd"], "toy")
    study = replace(STUDY, arms={"vanilla": ARM, "logit-only": ARM, "afd": ARM}, orderings=orderings)
    rows = make_rows({"vanilla": [0.80, 0.81], "afd": [0.90, 0.912]})
    text = write_report(study, rows, tmp_path)
    assert "- afd > vanilla: holds: +10.10 [+8.83, +11.37] points" in text
    assert "- vanilla ~ logit-only: not run yet" in text
    assert "The paper's orderings" not in write_report(STUDY, rows, tmp_path)
