"""`hfkd search METHOD`: a random search over a method's options, by its own data-free criterion.

Over optuna directly, and not by `Trainer.hyperparameter_search`: that one changes fields of a finished configuration,
unchecked, under a trainer whose draws, conditions and networks were made from the old ones. Here a trial is a run of
`hfkd train` in a folder of its own. A killed search goes on where it stopped: finished trials are in its journal, and
an unfinished one has checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from transformers.trainer_utils import sort_checkpoints

from hfkd.errors import InputError, RunError
from hfkd.trainers.config import check_range
from hfkd.trainers.interrupt import TrainingInterrupted

from .methods import METHODS, Method, find_method
from .options import RUN_FILE, build, read_options, read_yaml
from .results import exclusive, write_atomically
from .search_space import Space, describe, read_space
from .train import train


if TYPE_CHECKING:
    from optuna import Study

SPACES = Path(__file__).parent / "spaces"
JOURNAL, BEST_FILE = "search.journal", "best.yaml"
CRITERION = "loss"
_SET_BY_SEARCH = ("resume_from_checkpoint", "push_to_hub")


@dataclass
class SearchArguments:
    """How long is searched, and where. Each trial is trained with the options below, and those of the space."""

    trials: int = field(default=20, metadata={"help": "Trials, with those that an earlier search in the folder did."})
    space: str | None = field(
        default=None,
        metadata={"help": "YAML file: option: {low: A, high: B, log: true}, or option: {choices: [A, B]}."},
    )

    def __post_init__(self) -> None:
        check_range("trials", self.trials, 1)


def run(argv: list[str]) -> int:
    method = _method(argv[0] if argv and not argv[0].startswith("-") else None)
    kinds = [SearchArguments, *method.dataclasses()]
    values = read_options(kinds, argv[1:], f"hfkd search {method.name}", method.recipes)
    (arguments,) = build([SearchArguments], values)
    options = {name: value for name, value in values.items() if name not in ("trials", "space")}
    for name in _SET_BY_SEARCH:
        if name in options:
            raise InputError(f"{name} is set by the search itself: leave it out")
    folder = Path(options.pop("output_dir", f"runs/search-{method.name}"))
    space = read_space(Path(arguments.space or SPACES / f"{method.stem}.yaml"), method, options)
    print(search(method, options, space, arguments.trials, folder))
    return 0


def _method(name: str | None) -> Method:
    able = [method.name for method in METHODS.values() if method.data is None]
    if name is None:
        raise InputError(f"hfkd search needs a method first: {', '.join(able)}")
    method = find_method(name)
    if method.data is not None:
        raise InputError(
            f"{method.name} has no criterion without data: hfkd search is for {', '.join(able)}, and hfkd study "
            "compares settings of the others"
        )
    return method


def search(method: Method, options: dict[str, Any], space: Space, trials: int, folder: Path) -> str:
    """Train until there are `trials` in `folder`; what was found, as text. The best options are in `best.yaml` there.

    The parameters of a trial are a function of the seed and the trial's number, wherever the search was stopped.

    Raises:
        InputError: the folder holds a search with other options or another space.
        RunError: no trial could be trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder), _study(folder / JOURNAL) as study:
        _check_same(study, {"options": options, "space": space}, folder)
        for number in range(trials):
            _finish_trial(study, number, method, options, space, folder)
        finished = [trial for trial in study.trials if trial.value is not None]
        if not finished:
            raise RunError(f"all {trials} trials failed: see the lines above, and narrow the space")
        best, value = study.best_trial, study.best_value
        values = read_yaml(folder / f"trial_{best.number}" / RUN_FILE)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    header = f"# hfkd train {method.name} --config {BEST_FILE} --output_dir FOLDER\n"
    write_atomically(folder / BEST_FILE, header + text)
    return (
        f"best of {len(finished)} trials: number {best.number}, {CRITERION} {value:.4f} with "
        f"{describe(best.params)}; its generator is in {folder}/trial_{best.number}, and its options in "
        f"{folder}/{BEST_FILE}"
    )


@contextmanager
def _study(journal: Path) -> "Iterator[Study]":
    """The search that the journal tells of, or a new one."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise InputError("hfkd search needs optuna: pip install 'hfkd[search]'") from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    try:
        yield optuna.create_study(storage=storage, study_name="search", direction="minimize", load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(before)


def _check_same(study: "Study", asked: dict[str, Any], folder: Path) -> None:
    before = study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", asked)
        return
    for kind in asked:
        changed = [name for name in {**before[kind], **asked[kind]} if before[kind].get(name) != asked[kind].get(name)]
        if changed:
            name = changed[0]
            raise InputError(
                f"{folder} holds a search whose {kind} have {name}={before[kind].get(name)!r}, and now it is "
                f"{asked[kind].get(name)!r}: name another --output_dir"
            )


def _finish_trial(
    study: "Study", number: int, method: Method, options: dict[str, Any], space: Space, folder: Path
) -> None:
    """Train trial `number`, unless that has been done, and write its value into the journal."""
    from optuna.samplers import RandomSampler
    from optuna.trial import TrialState

    if number == len(study.trials):
        seed = np.random.SeedSequence([options.get("seed", 42), number]).generate_state(1)
        study.sampler = RandomSampler(seed=int(seed[0]))
        trial = study.ask()
        for name, one in space.items():
            _suggest(trial, name, one)
    asked = study.trials[number]
    if asked.state.is_finished():
        return
    place = folder / f"trial_{number}"
    resume = "true" if sort_checkpoints(output_dir=str(place)) else None
    values = {**options, **asked.params, "output_dir": str(place), "resume_from_checkpoint": resume}
    try:
        value = train(method, values, show_logs=False)["metrics"][CRITERION]
    except TrainingInterrupted:
        raise  # it is resumed by the next search
    except RunError as error:
        study.tell(number, state=TrialState.FAIL)
        print(f"trial {number} with {describe(asked.params)} failed: {error}", flush=True)
        return
    study.tell(number, value)
    print(f"trial {number}: {CRITERION} {value:.4f} with {describe(asked.params)}", flush=True)


def _suggest(trial: Any, name: str, one: dict[str, Any]) -> None:
    if "choices" in one:
        trial.suggest_categorical(name, one["choices"])
    elif isinstance(one["low"], int):
        trial.suggest_int(name, one["low"], one["high"], log=one["log"])
    else:
        trial.suggest_float(name, one["low"], one["high"], log=one["log"])
