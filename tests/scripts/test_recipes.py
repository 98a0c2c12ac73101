"""Every shipped recipe makes a valid configuration, found by its bare name."""

import pytest

from hfkd.scripts.methods import METHODS
from hfkd.scripts.options import build, read_options


RECIPES = [(method, path.stem) for method in METHODS.values() for path in sorted(method.recipes.glob("*.yaml"))]


@pytest.mark.parametrize(("method", "name"), RECIPES, ids=lambda value: getattr(value, "stem", value))
def test_recipe(method, name):
    kinds = method.dataclasses()
    values = read_options(kinds, ["--config", name], f"hfkd train {method.name}", method.recipes)
    assert values
    # A recipe with bf16 is for a GPU, or for a CPU that was asked for.
    setup, *data, config = build(kinds, {**values, "use_cpu": True})
    assert [one.dataset_name for one in data] == ([values["dataset_name"]] if method.data else [])
    lengths = {name: values[name] for name in ("num_train_epochs", "max_steps") if name in values}
    assert lengths == {name: getattr(config, name) for name in lengths} != {}


def test_each_method_ships_a_recipe_that_runs_offline():
    assert {method.stem for method, name in RECIPES if name == "digits"} == set(METHODS)
