"""Load a config: a YAML file and dotted overrides → a frozen pydantic model, with errors that name the key."""

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict

from pipelines.errors import PipelineError
from pipelines.lasting import is_uploaded


class Frozen(BaseModel):
    """A section of a config. Unknown keys are errors, and so are infinite numbers and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def spelt(pattern: str, allowed: str) -> pydantic.AfterValidator:
    """A validator for names: the whole name must match `pattern`; the error says in words what is `allowed`."""

    def check(name: str) -> str:
        if re.fullmatch(pattern, name) is None:
            raise ValueError(f"{name!r} is not a valid name; allowed are {allowed}")
        return name

    return pydantic.AfterValidator(check)


RunName = Annotated[
    str,
    spelt(r"[a-z0-9][a-z0-9_-]{0,99}", "100 lower-case letters, digits, - and _ at most, a letter or digit first"),
]
"""The name of a curriculum or sweep, which becomes part of folder names, as do those of stages: 255 letters at most."""

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
"""A seed that both PyTorch and NumPy take."""

Config = typing.TypeVar("Config", bound=BaseModel)

_LISTED = 2
"""So many overrides are listed where it is not known which of them is wrong."""

Location = tuple[int | str, ...]
"""Keys and positions that lead to a value of the config."""


def load_config(kind: type[Config], path: str, overrides: Sequence[str]) -> Config:
    """Read a YAML file (which may extend another), apply `dotted.key=value` overrides, validate.

    A list element is addressed by its number or by its name: `stages.chairs.steps=100`. Values are YAML.
    Raises PipelineError that names the key and, for a misspelt one, the nearest known key.
    """
    tree = _read_yaml(Path(path), ())
    places = {override: _apply(tree, override) for override in overrides}
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise PipelineError(f"{_source(path, places, error)}: {_explain(kind, tree, error)}") from error


def _source(path: str, places: Mapping[str, Location], error: pydantic.ValidationError) -> str:
    """Where the faulty value came from: the file, or the last override of the value or of a section that holds it."""
    where = error.errors()[0]["loc"]
    for override, place in reversed(list(places.items())):
        if where[: len(place)] == place:
            return f"override {override!r}"
    return path if where or not places else f"{path} with {_few(list(places))}"


def _few(overrides: Sequence[str]) -> str:
    """The overrides, or how many they are: with many of them the line would begin with what is not wrong."""
    return " ".join(overrides) if len(overrides) <= _LISTED else f"its {len(overrides)} overrides"


def _read_yaml(path: Path, over: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file, merged over the one in the file beside it that `extends` names.

    Args:
        path: path of the file.
        over: the files that extend it.
    """
    if path.absolute() in over:
        raise PipelineError(f"{over[0]}: extends itself, by way of {path}")
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        hint = "; what git ignores, such as runs/, is not uploaded with a job" if is_uploaded(str(Path.cwd())) else ""
        raise PipelineError(f"{path}: no such config file{hint}") from None
    except IsADirectoryError:
        raise PipelineError(f"{path}: a folder, no config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PipelineError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise PipelineError(f"{path}: a config is a mapping of keys to values")
    base = tree.pop("extends", None)
    if not isinstance(base, str | None):
        raise PipelineError(f"{path}: extends: the name of one file beside this one, not {base!r}")
    tree = _unshared(tree)
    return tree if base is None else _merge(_read_yaml(path.parent / base, (*over, path.absolute())), tree)


def _unshared(value: Any) -> Any:
    """A copy in which a YAML anchor and its aliases share nothing: an override of one does not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else is replaced."""
    both = {key: _merge(base[key], over[key]) for key in base.keys() & over.keys() if _mappings(base[key], over[key])}
    return {**base, **over, **both}


def _mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _apply(tree: dict[str, Any], override: str) -> Location:
    """Set one value of the tree. Returns its location."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PipelineError(f"override {override!r}: write key=value, such as stages.chairs.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"override {override!r}: the value is not YAML: {error}") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 2e-4 as a string
    node: Any = tree
    place: Location = ()
    *parents, last = key.split(".")
    for name in parents:
        part = _part(node, name, override)
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]
        place = (*place, part)
    part = _part(node, last, override)
    node[part] = value
    return (*place, part)


def _part(node: Any, name: str, override: str) -> int | str:
    """In a section, the key `name` itself; in a list, the position of the element with this name or number."""
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise PipelineError(f"override {override!r}: {name!r} lies below a value, not a section")
    names = _names(node)
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(node):
        return int(name)
    raise PipelineError(f"override {override!r}: no {name!r} here; there is {', '.join(names)}")


def _names(elements: list[Any]) -> list[str]:
    return [str(each.get("name", n)) if isinstance(each, dict) else str(n) for n, each in enumerate(elements)]


def _named(tree: Any, location: Location) -> str:
    """A location in the config as an override would write it: list elements by name, if they have one."""
    names = []
    for part in location:
        if part == "[key]":  # so pydantic marks that the key itself is wrong
            break
        inside = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        names.append(_names(tree)[int(part)] if inside else str(part))
        tree = tree[part] if inside else tree.get(part) if isinstance(tree, dict) else None
    return ".".join(names)


def _explain(kind: type[BaseModel], tree: dict[str, Any], error: pydantic.ValidationError) -> str:
    """The first error in one line. For an unknown key it names the nearest known key, or else all known keys."""
    first, *more = error.errors()
    where = _named(tree, first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, name = first["loc"]
        known = sorted(_keys_at(kind, parents))
        near = difflib.get_close_matches(str(name), known, n=1)
        problem = f"unknown key {where}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    elif first["type"] == "missing":
        problem = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        problem = f"{where}: {message}" if where else message
        if first["type"] != "value_error":
            problem += f", not {first['input']!r}"
    return problem + (f" (and {len(more)} more)" if more else "")


def _keys_at(kind: Any, path: Sequence[int | str]) -> set[str]:
    """Field names of the model at a location of the config."""
    for part in path:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
            models = [k for k in typing.get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
            kind = models[0] if models else kind
    return set(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else set()
