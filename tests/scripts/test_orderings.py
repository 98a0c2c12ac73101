import math

import pytest
import yaml

from hfkd.errors import InputError
from hfkd.evaluation.statistics import Estimate
from hfkd.scripts.orderings import read_orderings
from hfkd.scripts.study_file import read_study


ARMS = ["activation", "gradient", "full"]


@pytest.mark.parametrize(
    ("claim", "value", "error", "verdict"),
    [
        ("full > activation", 0.07, 0.01, "holds: +7.00 [+2.70, +11.30] points"),
        ("full > activation", 0.04, 0.01, "open: +4.00 [-0.30, +8.30] points"),
        ("full > activation", -0.04, 0.01, "open: -4.00 [-8.30, +0.30] points"),
        ("full > activation", -0.05, 0.01, "does not hold: -5.00 [-9.30, -0.70] points"),
        ("full > activation", 0.07, math.nan, "open: +7.00 points in one seed"),
        ("full ~ gradient", 0.004, 0.001, "holds: +0.40 [-0.03, +0.83] points"),
        ("full ~ gradient", 0.005, 0.05, "open: +0.50 [-21.01, +22.01] points"),
        ("full ~ gradient", 0.02, 0.01, "open: +2.00 [-2.30, +6.30] points"),
        ("full ~ gradient", -0.02, 0.001, "does not hold: -2.00 [-2.43, -1.57] points"),
        ("full ~ gradient", 0.0112, 0.001, "open: +1.12 [+0.69, +1.55] points"),
        ("full ~2 gradient", 0.0112, 0.001, "holds: +1.12 [+0.69, +1.55] points"),
        ("full ~2 gradient", -0.0112, 0.005, "open: -1.12 [-3.27, +1.03] points"),
        ("full ~2 gradient", -0.025, 0.001, "does not hold: -2.50 [-2.93, -2.07] points"),
        ("full ~0.5 gradient", 0.006, 0.0001, "does not hold: +0.60 [+0.56, +0.64] points"),
    ],
)
def test_verdicts(claim, value, error, verdict):
    (ordering,) = read_orderings([claim], ARMS, "study.yaml")
    assert str(ordering) == claim
    assert ordering.verdict(Estimate(value, error, 3)) == verdict


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("full >= activation", "'full >= activation' is not of the form"),
        ("full > activation > gradient", "is not of the form"),
        ("full >2 activation", "'full >2 activation' is not of the form"),
        ("full ~two activation", "is not of the form"),
        ("full ~0 activation", "is not of the form"),
        ("full ~-1 activation", "is not of the form"),
        ("full ~nan activation", "is not of the form"),
        ("full > activaton", "'activaton' is no arm.*activation"),
    ],
)
def test_refuses(line, message):
    with pytest.raises(InputError, match=message):
        read_orderings([line], ARMS, "study.yaml")


def test_only_shares_are_ordered(tmp_path):
    path = tmp_path / "study.yaml"
    study = {"method": "vae", "arms": {"a": {}, "b": {}}, "seeds": [0], "orderings": ["a > b"]}
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(InputError, match="orderings are of shares such as accuracies, and the first metric is 'elbo'"):
        read_study(path)
