"""A store on disk that one rank fills and all ranks read."""

from collections.abc import Callable
from typing import TypeVar

from .distributed import failing_together


Store = TypeVar("Store")


def shared_store(setting: str, first: bool, fill: Callable[[], Store], reopen: Callable[[], Store]) -> Store:
    """Rank 0 fills the store where there is none, and checks it; then the others open it. Called by all ranks.

    Args:
        setting: the option that names the folder, for messages.
        first: whether this is rank 0.
        fill: opens the store, filled before where need be.
        reopen: opens it as it is.

    Raises:
        InputError: on all ranks, where a rank raised one.
        RunError: on all ranks, where a rank raised something else.
    """
    store = None
    with failing_together(f"filling {setting}"):
        if first:
            store = fill()
    with failing_together(f"opening {setting}"):
        if store is None:
            store = reopen()
    assert store is not None
    return store
