"""The table, the sentences and the figure of a study, from the rows of its results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hfkd.errors import InputError
from hfkd.evaluation.statistics import Estimate, describe_difference, mean_over_seeds, paired_difference

from .results import Row
from .study_file import Run, Study, is_share
from .suggest import nearest


Values = dict[str, dict[int, float]]  # arm -> seed -> value


def duration(seconds: float) -> str:
    """`seconds` as people say it, such as `1 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe_run(item: Run, rows: Sequence[Row], metric: str, seconds_left: float) -> str:
    """One line for a run that has just finished."""
    values = {row["metric"]: float(row["value"]) for row in rows}
    if metric not in values:
        raise InputError(
            f"no metric {metric!r} in the results{nearest(metric, values)}; there are {', '.join(values)}."
        )
    took = f" in {duration(float(rows[0]['wall_s']))}" if rows[0]["wall_s"] else " (resumed)"
    return f"{item.arm}, seed {item.seed}: {metric} {values[metric]:.4f}{took}; {duration(seconds_left)} left"


def collect(study: Study, rows: Sequence[Row], metric: str) -> Values:
    """The study's values of one metric, by arm and seed. Raises `InputError` for a metric that no row has."""
    own = [row for row in rows if row["recipe"] == study.name and row["dataset"] == study.dataset]
    known = sorted({row["metric"] for row in own})
    if metric not in known:
        raise InputError(f"no metric {metric!r} in the results{nearest(metric, known)}; there are {', '.join(known)}.")
    values: Values = {arm: {} for arm in study.arms}
    for row in own:
        if row["metric"] == metric and row["arm"] in values and int(row["seed"]) in study.arms[row["arm"]].seeds:
            values[row["arm"]][int(row["seed"])] = float(row["value"])
    return {arm: by_seed for arm, by_seed in values.items() if by_seed}


def compare(values: Values, arm: str, reference: str) -> Estimate | None:
    """Paired difference of an arm to the reference over the seeds that both have; None where there is none."""
    seeds = sorted(values.get(arm, {}).keys() & values.get(reference, {}).keys())
    if arm == reference or not seeds:
        return None
    return paired_difference([values[arm][seed] for seed in seeds], [values[reference][seed] for seed in seeds])


def measured_arms(study: Study, collected: Mapping[str, Values]) -> dict[str, int]:
    """The arms that have any of the metrics, in the study's order, and how many seeds of each are measured."""
    counts = {arm: [len(values[arm]) for values in collected.values() if arm in values] for arm in study.arms}
    return {arm: max(of_arm) for arm, of_arm in counts.items() if of_arm}


def format_mean(estimate: Estimate | None, metric: str) -> str:
    """`81.25 ± 0.31`, in percent for shares; without the standard error where one seed gives none."""
    if estimate is None:
        return "—"
    factor, digits = _unit(metric)
    value = f"{estimate.value * factor:.{digits}f}"
    return value if estimate.n < 2 else f"{value} ± {estimate.standard_error * factor:.{digits}f}"


def format_difference(estimate: Estimate | None, metric: str) -> str:
    """`+0.58 [-0.40, +1.56]`, in points for shares; without the 95 % interval where one seed gives none."""
    if estimate is None:
        return "—"
    factor, digits = _unit(metric)
    value, low, high = (f"{number * factor:+.{digits}f}" for number in (estimate.value, *estimate.interval))
    return value if estimate.n < 2 else f"{value} [{low}, {high}]"


def _unit(metric: str) -> tuple[float, int]:
    """What a value is multiplied by to be shown, and its digits."""
    return (100, 2) if is_share(metric) else (1, 4)


def make_table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown: mean ± standard error over seeds per arm and metric, and paired differences to the reference arm.

    A difference stands with its 95 % confidence interval.
    An arm whose method does not have a metric has a dash there.
    """
    collected = {metric: collect(study, rows, metric) for metric in study.metrics}
    heads = ["arm", "seeds"]
    for metric in study.metrics:
        heads += [f"{metric}{' (%)' if is_share(metric) else ''}", f"minus {study.reference}"]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for arm, seeds in measured_arms(study, collected).items():
        cells = [arm, str(seeds)]
        for metric, values in collected.items():
            mean = mean_over_seeds(list(values[arm].values())) if arm in values else None
            cells.append(format_mean(mean, metric))
            cells.append(format_difference(compare(values, arm, study.reference), metric))
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def describe(study: Study, rows: Sequence[Row]) -> str:
    """One sentence per arm on how it compares with the reference in the first metric, where that is a share."""
    metric = study.metrics[0]
    if not is_share(metric):
        return ""
    values = collect(study, rows, metric)
    differences = {arm: compare(values, arm, study.reference) for arm in values}
    return "\n".join(
        f"- {metric}: {describe_difference(difference, arm, study.reference)}"
        for arm, difference in differences.items()
        if difference is not None
    )


def check_orderings(study: Study, rows: Sequence[Row]) -> str:
    """For each of the study's orderings, whether the first metric's paired differences bear it out."""
    if not study.orderings:
        return ""
    values = collect(study, rows, study.metrics[0])
    lines = []
    for ordering in study.orderings:
        found = compare(values, ordering.first, ordering.second)
        lines.append(f"- {ordering}: {'not run yet' if found is None else ordering.verdict(found)}")
    return "The paper's orderings:\n" + "\n".join(lines)


def write_report(study: Study, rows: Sequence[Row], folder: Path) -> str:
    """Write `table.md` and `figure.png` into `folder`; returns the table, the sentences, and where they lie."""
    n_test = sorted({row["n_test"] for row in rows if row["recipe"] == study.name and row["dataset"] == study.dataset})
    caption = (
        f"{study.name} on {study.dataset}: {', '.join(n_test)} test images; mean ± standard error over seeds, and the "
        f"mean of the per-seed differences to {study.reference} with its 95 % confidence interval."
    )
    parts = (make_table(study, rows), caption, describe(study, rows), check_orderings(study, rows))
    text = "\n\n".join(part for part in parts if part)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    try:
        from .figure import draw_study
    except ModuleNotFoundError as error:
        return f"{text}\n\ntable: {folder / 'table.md'}; no figure, since {error.name} is missing: install hfkd[plots]"
    draw_study(study, {metric: collect(study, rows, metric) for metric in study.metrics}, folder / "figure.png")
    return f"{text}\n\ntable: {folder / 'table.md'}; figure: {folder / 'figure.png'}"
