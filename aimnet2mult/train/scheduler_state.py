"""What a scheduler of Ignite or PyTorch remembers, as plain values that a checkpoint may hold.

Their own state dictionaries do not serve: some hold functions, some leave out what nested schedulers remember, and
each has a form of its own. Here a scheduler is the list of the objects that it consists of (itself, schedulers within
it, functions with a state), in an order that its arguments determine. The state of each of them is its attributes:

- numbers, texts, nothing, and lists, tuples and mappings of such,
- references to other objects of the list, such as the scheduler that a sequence has arrived at, as their number there.

Optimisers and functions are no state; a scheduler that is built from the same arguments has the same ones.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError

State = list[dict[str, Any]]
"""For each object its ``type``, its plain ``values`` by attribute, and its ``references`` by attribute."""


def parts(scheduler: Any, name: str) -> list[Any]:
    """Return the objects that a scheduler consists of, itself first.

    Parameters
    ----------
    scheduler : object
        Any scheduler, just built.
    name : str
        What it is called in messages.

    Raises
    ------
    ConfigError
        It remembers something that a checkpoint cannot hold.
    """
    found: list[Any] = []

    def visit(value: Any, where: str) -> None:
        if _is_plain(value) or isinstance(value, Optimizer) or any(value is part for part in found):
            return
        if isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                visit(item, where)
        elif _has_state(value):
            found.append(value)
            for key, item in vars(value).items():
                visit(item, f"{where}.{key}")
        elif not callable(value):
            raise ConfigError(f"scheduler: a checkpoint cannot hold {where}, which is a {type(value).__name__}")

    visit(scheduler, name)
    return found


def state_of(objects: Sequence[Any]) -> State:
    """Return the state of the objects of a scheduler (`parts`): plain values, copied."""
    numbers = {id(part): number for number, part in enumerate(objects)}
    return [
        {
            "type": type(part).__name__,
            "values": {key: copied(value) for key, value in vars(part).items() if _is_plain(value)},
            "references": {key: numbers[id(value)] for key, value in vars(part).items() if id(value) in numbers},
        }
        for part in objects
    ]


def fits(objects: Sequence[Any], state: State) -> bool:
    """Whether a state is that of a scheduler of the same make: the same objects, and no attribute is missing.

    It may hold more attributes than a scheduler that was just built has: some get them when they are first used.
    """
    return len(state) == len(objects) and all(
        now["type"] == known["type"] and set(now[kind]) <= set(known[kind])
        for now, known in zip(state_of(objects), state, strict=True)
        for kind in ("values", "references")
    )


def restore(objects: Sequence[Any], state: State) -> None:
    """Give the objects of a scheduler a state that `fits`."""
    for part, known, now in zip(objects, state, state_of(objects), strict=True):
        for key, value in known["values"].items():
            # What never changes keeps its type, such as the counter of milestones of a torch scheduler.
            if key not in now["values"] or value != now["values"][key]:
                setattr(part, key, copied(value))
        for key, number in known["references"].items():
            setattr(part, key, objects[number])


def _has_state(value: Any) -> bool:
    function = callable(value) and hasattr(value, "__name__")
    return hasattr(value, "__dict__") and not function and not isinstance(value, ModuleType | Tensor)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def copied(value: Any) -> Any:
    """Return a plain value in Python's own types (numpy's float64 is a float, too), independent of the given one."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [copied(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
