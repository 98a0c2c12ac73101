"""Whether `metric_for_best_model` is measured at all: found out on two images, before the first step."""

import difflib
from typing import TYPE_CHECKING

import torch

from hfkd.data import ImageSource
from hfkd.errors import InputError
from hfkd.models.probing import undisturbed

from .state import restore_rng_state, rng_state


if TYPE_CHECKING:
    from .base import DistillationTrainer


def check_metric_for_best_model(trainer: "DistillationTrainer") -> None:
    """Look for the metric among those that evaluation gives; best-model and early stopping both read it.

    Trainer would find out in its first evaluation. The names come from measuring two images of each evaluation set,
    which leaves no trace: a list of them would have to be kept for every method.

    Raises:
        InputError: with the nearest of the metrics, and all of them.
    """
    wanted, sets = trainer.args.metric_for_best_model, trainer.eval_dataset
    if wanted is None or sets is None:
        return
    parts = {f"{name}_": source for name, source in sets.items()} if isinstance(sets, dict) else {"": sets}
    measured = {prefix: _metric_names(trainer, source) for prefix, source in parts.items()}
    known = [prefix + name for prefix, names in measured.items() for name in names or ()]
    if wanted.removeprefix("eval_") not in known and None not in measured.values():
        nearest = difflib.get_close_matches(wanted.removeprefix("eval_"), known, n=1, cutoff=0.0)
        suggestion = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise InputError(
            f"metric_for_best_model={wanted!r} is not measured{suggestion}: choose one of {', '.join(sorted(known))}"
        )


def _metric_names(trainer: "DistillationTrainer", source: ImageSource) -> list[str] | None:
    """Names, without prefix, of what evaluation measures on `source`; None where two images do not tell."""
    if source.labels is None and trainer.evaluates_labels:
        return None
    generators = rng_state()
    with undisturbed(trainer.model):
        keys = [(0, index) for index in range(min(2, len(source)))]
        batch = trainer._materialise(source, trainer.data_collator(source.__getitems__(keys)))
        batch.setdefault("labels", torch.full_like(batch["index"], -100))
        with trainer.autocast():
            outputs = trainer.evaluation_step(batch)
    on_cpu = {name: value.cpu() for name, value in outputs.items()}
    try:
        return list(trainer.evaluation_metrics(on_cpu, batch["labels"].cpu()))
    except InputError:
        return None  # a metric that two images do not define, such as one over labels that neither has
    finally:
        restore_rng_state(generators)
