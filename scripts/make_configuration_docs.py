"""Write the tables of options in ``docs``: those of a training run, what may change when it goes on, those of a study.

Options, types and meanings come from `aimnet2mult.train.schema` and `aimnet2mult.study.settings`, defaults of a run
from the packaged settings. The text around the tables is written by hand and is left alone.

    python scripts/make_configuration_docs.py
"""

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from aimnet2mult.study.settings import StudyConfig
from aimnet2mult.train.configuration import DEFAULT_CONFIG
from aimnet2mult.train.resume import FREE_SETTINGS
from aimnet2mult.train.schema import TrainConfig, yaml_key
from aimnet2mult.utils.files import write_text_atomic

DOCS = Path(__file__).resolve().parents[1] / "docs"

LONGEST_DEFAULT = 50
"""Characters of a default value that fit into the table."""

IN_FILE = "[in the file](../aimnet2mult/config/default_train_mixed_fidelity.yaml)"
"""What stands for a longer one."""

WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    list[Path]: "path or paths",
    Any: "text or mapping",
}
"""Types of single values."""

NAMES = {str: "name", int: "fidelity"}
"""What the keys of mappings stand for."""

ABSENT = object()
"""Default of an option in a section that is absent by default, and that must be given with it."""


@dataclass(frozen=True)
class Option:
    """A row of the table.

    Attributes
    ----------
    key : str
        Dotted key.
    kind : str
        Its type in words.
    default : str
        As in YAML.
    meaning : str
        One line.
    """

    key: str
    kind: str
    default: str
    meaning: str

    @property
    def row(self) -> str:
        """The row in Markdown."""
        cells = (f"`{self.key}`", self.kind, self.default, self.meaning)
        return "| " + " | ".join(cell.replace("|", "\\|").replace("->", "→") for cell in cells) + " |"


def options(schema: type, given: Any, prefix: str = "") -> Iterator[tuple[str, Option | None]]:
    """Yield section and row of every option; a section begins with an entry without a row.

    Parameters
    ----------
    schema : type
        A dataclass of the schema.
    given : mapping or None
        Its part of the packaged settings; None where it is absent.
    prefix : str
        Dotted key of the section, with a dot at the end.
    """
    yield prefix, None
    sections: list[tuple[Any, Any, str]] = []
    for entry, (hint, optional) in zip(fields(schema), hints(schema), strict=True):
        key = prefix + yaml_key(entry.name)
        default = default_of(entry, given)
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if is_dataclass(hint):
            sections.append((hint, default if isinstance(default, dict) else None, f"{key}."))
        elif is_dataclass(inner):
            sections.append((inner, None, f"{key}.{{name}}."))
        if not is_dataclass(hint) or optional:
            yield prefix, Option(key, kind(hint, optional), text(default), meaning(entry))
    for section in sections:
        yield from options(*section)


def hints(schema: type) -> list[tuple[Any, bool]]:
    """Type of each field, without None, and whether None is allowed."""
    found = []
    for hint in typing.get_type_hints(schema).values():
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (inner,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
            found.append((inner, True))
        else:
            found.append((hint, False))
    return found


def default_of(entry: Field[Any], given: Any) -> Any:
    """Return the packaged value of a field, or that of a section which is absent in the packaged settings."""
    if given is not None:
        return given[yaml_key(entry.name)]
    if is_dataclass(entry.type):
        return None
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return ABSENT if entry.default == "???" else entry.default


def kind(hint: Any, optional: bool) -> str:
    """Return a type in words."""
    if hint in WORDS:
        word = WORDS[hint]
    elif typing.get_origin(hint) is list:
        word = "list"
    elif typing.get_origin(hint) is dict:
        key, value = typing.get_args(hint)
        word = "mapping" if value is Any else f"{NAMES[key]} → {WORDS.get(value, 'mapping')}"
    else:
        word = "mapping"
    return f"{word} or null" if optional else word


def text(default: Any) -> str:
    """Return a default value as in YAML, or where it can be read."""
    if default is ABSENT:
        return "none, must be given"
    if isinstance(default, Path):
        default = str(default)
    flow = yaml.safe_dump(default, default_flow_style=True, width=1000, sort_keys=False)
    flow = flow.removesuffix("...\n").strip()
    return f"`{flow}`" if len(flow) <= LONGEST_DEFAULT else IN_FILE


def meaning(entry: Field[Any]) -> str:
    """Return the line on the meaning of a field."""
    return str(entry.metadata["meaning"])


def run_options() -> str:
    """Return the tables of the options of a training run."""
    return option_tables(TrainConfig, yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8")))


def study_options() -> str:
    """Return the tables of the options of a study of learning curves."""
    return option_tables(StudyConfig, None)


def option_tables(schema: type, packaged: Any) -> str:
    """Return the tables of all options, one for each section."""
    rows: dict[str, list[Option]] = {}
    for section, option in options(schema, packaged):
        part = section.partition(".")[0]
        rows.setdefault(part, []).extend([] if option is None else [option])
    pieces = []
    for part, found in rows.items():
        title = f"### `{part}`" if part else "### General"
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *(option.row for option in found)]
        pieces.append("\n".join([title, "", *table]))
    return "\n\n".join(pieces)


def free_settings() -> str:
    """Return the settings that may differ when a run goes on, as a list."""
    return "\n".join(f"- `{key.replace('*', '{name}')}`" for key in FREE_SETTINGS)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "configuration.md": {"options": run_options, "settings that may change": free_settings},
    "learning_curves.md": {"options": study_options},
}
"""What is made in each page, by the name in its marks."""


def updated(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with everything between the marks made anew.

    Raises
    ------
    ValueError
        A mark is missing.
    """
    for name, make in blocks.items():
        begin, end = f"<!-- {name}: made by scripts/make_configuration_docs.py -->", f"<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"expected the marks {begin} and {end} once each")
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return page


def main() -> None:
    """Write the pages."""
    for name, blocks in PAGES.items():
        path = DOCS / name
        write_text_atomic(path, updated(path.read_text(encoding="utf-8"), blocks))
        print(path)


if __name__ == "__main__":
    main()
