import gc
import time

import pytest

from hfkd.errors import InputError
from hfkd.scripts.results import read_csv
from hfkd.scripts.timing import COLUMNS, Measured, Timings, append_measured, measure


def test_calls_alternate_and_none_always_runs_first():
    calls = []
    timings = measure({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=1)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_of_sleeps():
    timings = measure({"long": lambda: time.sleep(0.03), "short": lambda: time.sleep(0.01)}, repeats=3, warmup=0)
    assert 2 < timings.ratio("long", "short") < 4


def test_ratios_are_taken_within_a_round():
    # A machine that becomes ten times slower halfway changes no ratio.
    timings = Timings({"step": [3.0, 30.0, 30.0], "a": [1.0, 10.0, 10.0], "b": [0.5, 5.0, 5.0]})
    assert timings.ratio("step", "a", "b") == 2.0
    assert timings.median("step") == 30.0


def test_garbage_collection_comes_back():
    def fail():
        assert not gc.isenabled()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure({"fail": fail})
    assert gc.isenabled()


def test_nothing_to_measure_is_refused():
    for callables, repeats in (({}, 5), ({"a": int}, 0)):
        with pytest.raises(InputError, match="nothing to measure"):
            measure(callables, repeats=repeats)


@pytest.mark.parametrize(
    ("row", "met", "words"),
    [
        (Measured("a", 1.04, to_reach=1.05), True, "a: 1.04 x (to reach: at most 1.05) met"),
        (Measured("a", 1.06, to_reach=1.05), False, "NOT MET"),
        (Measured("a", 9.0, to_reach=10.0, at_least=True), False, "at least 10) NOT MET"),
        (Measured("a", 3.0, unit="s"), None, "a: 3 s"),
    ],
)
def test_bounds(row, met, words):
    assert row.met is met
    assert words in row.describe()


def test_rows_with_machine_and_versions(tmp_path):
    path = tmp_path / "speed.csv"
    for _ in range(2):
        append_measured(path, "online-adversarial", [Measured("a, b", 1.04, to_reach=1.05)], repeats=7)
    rows = read_csv(path, COLUMNS)
    assert len(rows) == 2
    assert rows[0]["what"] == "a, b"
    assert (rows[0]["to_reach"], rows[0]["met"], rows[0]["repeats"]) == ("<= 1.05", "true", "7")
    assert "torch" in rows[0]["versions"]
