"""What a study file says: arms, which may differ in their methods, over common settings, times seeds."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkd.errors import InputError

from .methods import Method, find_method
from .options import build, check_values, read_yaml
from .orderings import Ordering, read_orderings
from .study_protocols import Protocols, check_can_be_probed, read_protocols
from .suggest import nearest


KEYS = (
    "name",
    "method",
    "recipe",
    "settings",
    "arms",
    "seeds",
    "reference",
    "metrics",
    "protocols",
    "protocol_settings",
    "orderings",
)
SET_BY_STUDY = ("seed", "data_seed", "output_dir", "resume_from_checkpoint", "push_to_hub")


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its method, and every option it is trained with."""

    arm: str
    seed: int
    method: Method
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Its place below the study's folder of runs."""
        return Path(self.arm) / f"seed_{self.seed}"


@dataclass(frozen=True)
class Arm:
    """What the runs of an arm share: the method, and every option but the seed; and with which seeds they are."""

    method: Method
    settings: dict[str, Any]
    seeds: list[int]

    @property
    def dataset(self) -> str:
        """The last part of the data's name, as in the results; `none` of a method without data.

        So a report can be made where the folder is not, and rows of a folder and of the Hub's copy stand together.
        """
        if self.method.data is None:
            return "none"
        (data_arguments,) = (kind for kind in self.method.dataclasses() if kind.__name__ == "DataArguments")
        default = next(item.default for item in dataclasses.fields(data_arguments) if item.name == "dataset_name")
        name = str(self.settings.get("dataset_name", default))
        return Path(name).name or Path(name).resolve().name


@dataclass(frozen=True)
class Study:
    """A study file, checked: every arm is known to make a valid configuration before the first run starts.

    `method` is the study's own: that of the arms which name none.
    """

    name: str
    method: Method
    arms: dict[str, Arm]
    reference: str
    metrics: list[str]
    orderings: list[Ordering] = field(default_factory=list)
    protocols: Protocols = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Those of all arms, in the order in which the arms name them."""
        return list(dict.fromkeys(seed for arm in self.arms.values() for seed in arm.seeds))

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed, so that the arms can be compared as early as possible.

        The arms of one seed share initialisation and data order, as far as their methods have them in common.
        """
        for seed in self.seeds:
            for name, arm in self.arms.items():
                if seed in arm.seeds:
                    yield Run(name, seed, arm.method, {**arm.settings, "seed": seed, "data_seed": seed})

    @property
    def dataset(self) -> str:
        """The data's name for the results, which is one for all arms."""
        return next(iter(self.arms.values())).dataset


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return metric.endswith(("accuracy", "top5", "average_precision", "11_point"))


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Its keys: `method`; `arms` (name: options that differ); `seeds`; and optionally `name` (the recipe's name in the
    results; default: the file's), `recipe` (a shipped recipe or a YAML file beside the study), `settings` (options of
    all arms, over the recipe), `reference` (the arm that others are compared with; default: the first), `metrics`
    (of the table and the figure; default: those of the reference's method; every arm needs the first), `protocols`
    (`knn`, `linear-probe`: what is measured of each run's student when it is trained; `metrics_of` says how it is
    called), `protocol_settings` (options of `hfkd evaluate` for them) and `orderings` (what the paper says about the
    arms in the first metric, such as `full > activation` or, for about equal, `full ~ gradient`: within 1 point, or
    with `~2` within 2).

    Among an arm's options may be a `method`, `recipe` (of that method, if shipped) and `seeds` of its own, in place of
    the study's. An arm that is not trained at all, to compare with, has `num_train_epochs: 0`.

    Raises:
        InputError: an unknown key, option, method, protocol, reference or ordering, an arm whose configuration is
            refused, settings of all arms that the method of one does not know, or arms on different data.
    """
    content = read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, KEYS)}; keys: {', '.join(KEYS)}.")
    missing = [key for key in ("method", "arms", "seeds") if not content.get(key)]
    if missing:
        raise InputError(f"{path}: {missing[0]!r} is missing or empty; a study needs method, arms and seeds.")
    method = find_method(str(content["method"]))
    seeds = _list(content, "seeds", int, str(path))
    arms = {name: _read_arm(name, content, seeds, path) for name in _mapping(content, "arms", str(path))}
    _check_one_dataset(arms, path)
    reference = content.get("reference", next(iter(arms)))
    if reference not in arms:
        raise InputError(f"{path}: reference {reference!r} is no arm{nearest(str(reference), arms)}.")
    metrics = _list({"metrics": list(arms[reference].method.metrics), **content}, "metrics", str, str(path))
    return Study(
        name=str(content.get("name", path.stem)),
        method=method,
        arms=arms,
        reference=reference,
        metrics=metrics,
        orderings=_read_orderings(content, arms, metrics[0], path),
        protocols=_read_protocols(content, arms, path),
    )


def _read_arm(name: str, content: dict[str, Any], seeds: list[int], path: Path) -> Arm:
    source = f"{path}: arm {name!r}"
    _check_folder_name(name, path)
    own = dict(_mapping(content["arms"], name, str(path)))
    try:
        method = find_method(str(own.pop("method", content["method"])))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if "seeds" in own:
        seeds = _list({"seeds": own.pop("seeds")}, "seeds", int, source)
    recipe = _read_recipe(own.pop("recipe", content.get("recipe")), method, path, source)
    common = _mapping(content, "settings", str(path))
    check_values(common, method.dataclasses(), f"{path}: settings, which arm {name!r} of {method.name} shares")
    return Arm(method, _check_arm(method, {**recipe, **common, **own}, source), seeds)


def _check_one_dataset(arms: dict[str, Arm], path: Path) -> None:
    (first, one), *others = arms.items()
    for name, arm in others:
        if arm.dataset != one.dataset:
            raise InputError(
                f"{path}: arm {name!r} has dataset {arm.dataset!r} and arm {first!r} has {one.dataset!r}: a study is "
                "of one; put dataset_name into settings."
            )


def _read_protocols(content: dict[str, Any], arms: dict[str, Arm], path: Path) -> Protocols:
    names = _list(content, "protocols", str, str(path)) if "protocols" in content else []
    protocols = read_protocols(names, _mapping(content, "protocol_settings", str(path)), str(path))
    for name, arm in arms.items():
        check_can_be_probed(arm.method, arm.settings, protocols, f"{path}: arm {name!r}")
    return protocols


def _read_recipe(name: Any, method: Method, path: Path, source: str) -> dict[str, Any]:
    if name is None:
        return {}
    candidates = [path.parent / str(name), method.recipes / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return read_yaml(candidate)
    shipped = [recipe.stem for recipe in sorted(method.recipes.glob("*.yaml"))]
    raise InputError(
        f"{source}: recipe {name!r} is neither a file beside it nor shipped{nearest(str(name), shipped)}; "
        f"shipped for {method.name}: {', '.join(shipped) or 'none'}."
    )


def _check_arm(method: Method, settings: dict[str, Any], source: str) -> dict[str, Any]:
    for name in SET_BY_STUDY:
        if name in settings:
            raise InputError(f"{source}: {name} is set by the study itself; leave it out.")
    kinds = method.dataclasses()
    checked = check_values(settings, kinds, source)
    try:
        build(kinds, checked)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return checked


def _read_orderings(content: dict[str, Any], arms: dict[str, Any], metric: str, path: Path) -> list[Ordering]:
    if "orderings" not in content:
        return []
    if not is_share(metric):
        raise InputError(f"{path}: orderings are of shares such as accuracies, and the first metric is {metric!r}.")
    return read_orderings(_list(content, "orderings", str, str(path)), arms, str(path))


def _check_folder_name(arm: str, path: Path) -> None:
    if not arm or not all(character.isalnum() or character in "-_.+" for character in arm) or arm.startswith("."):
        raise InputError(f"{path}: arm {arm!r} names a folder: use letters, digits, '-', '_', '+' and '.'.")


def _mapping(content: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source}: {key}: {value!r} is not a mapping of names to values.")
    return value


def _list(content: dict[str, Any], key: str, kind: type, source: str) -> list[Any]:
    value = content[key]
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        raise InputError(f"{source}: {key}: {value!r} is not a list ([a, b]) of {kind.__name__} values.")
    if len(set(value)) < len(value):
        raise InputError(f"{source}: {key}: {value!r} names one twice.")
    return value
