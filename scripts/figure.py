"""The figure of a study: one panel per metric, one row per arm, every seed shown."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hfkd.evaluation.statistics import mean_over_seeds

from .report import Values, measured_arms
from .study_file import Study, is_share


def draw_study(study: Study, collected: dict[str, Values], path: Path) -> None:
    """Draw each arm's seeds as points and their mean with its standard error; a dashed line marks the reference."""
    arms = list(measured_arms(study, collected))
    figure = Figure(figsize=(1.6 + 3.4 * len(collected), 1.3 + 0.42 * len(arms)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(collected), sharey=True, squeeze=False)[0]
    for panel, (metric, values) in zip(panels, collected.items(), strict=True):
        factor = 100 if is_share(metric) else 1
        for position, arm in enumerate(arms):
            points = [factor * value for value in values.get(arm, {}).values()]
            if not points:
                continue
            mean = mean_over_seeds(points)
            colour = "tab:gray" if arm == study.reference else "tab:blue"
            panel.plot(points, [position - 0.18] * len(points), "o", color=colour, alpha=0.35, markersize=4, mew=0)
            error = mean.standard_error if mean.n > 1 else None
            panel.errorbar(mean.value, position, xerr=error, fmt="o", color=colour, capsize=4, markersize=6)
            if arm == study.reference:
                panel.axvline(mean.value, color=colour, linestyle="--", linewidth=0.8, zorder=0)
        panel.set_xlabel(metric.replace("_", " ") + (" (%)" if is_share(metric) else ""))
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    counts = sorted({len(arm.seeds) for arm in study.arms.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    figure.suptitle(
        f"{study.name}, {study.dataset}: {seeds} seed{'s' if counts[-1] > 1 else ''} and mean ± standard error",
        fontsize="medium",
    )
    FigureCanvasAgg(figure).print_png(path)
