"""From a YAML file and dotted overrides to a frozen run, or one report of everything that is wrong with them.

A file may name one runnable parent by `base: other.yaml`: mappings merge, lists replace, and a section whose `name` differs
replaces its parent's section whole. Overrides are `dotted.key=value` with YAML values. Nothing here imports torch.
"""

import difflib
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_pipelines.errors import UserError

Run = TypeVar("Run", bound=BaseModel)
Location = tuple[str | int, ...]


class ConfigError(UserError):
    """All problems of a config in one message."""


def load_run(root: type[Run], path: str | None, overrides: Sequence[str] = ()) -> Run:
    """Read, merge and validate the run in `path` (None: overrides alone). Raises ConfigError that lists every problem with its place."""
    values, places = _read_values(path, overrides)
    path = path or "the command line"
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_report(root, path, places, error)) from None


def read_values(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What is in the YAML file `path`, its base and the overrides, of whatever kind of run. Raises ConfigError if it cannot be read."""
    return _read_values(path, overrides)[0]


def _read_values(path: str | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[Location, str]]:
    values, places = ({}, {}) if path is None else _read_with_base(Path(path))
    for override in overrides:
        _apply_override(values, places, override)
    return values, places


def has_section(path: str, name: str) -> bool:
    """Whether the YAML file `path`, or its base, has a section `name`. Raises ConfigError if it cannot be read."""
    return name in read_values(path)


def save_resolved(run: BaseModel, path: Path) -> None:
    """Write the run with every default filled in, such that `load_run` reads it back equal."""
    replace_file(path, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def replace_file(path: Path, text: str) -> None:
    """Write a small file that others need: whole on the disk, or as it was before."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read_with_base(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    values, places = _read(path)
    if "base" not in values:
        return values, places
    parent_path = path.parent / str(values.pop("base"))
    parent, parent_places = _read(parent_path)
    if "base" in parent:
        raise ConfigError(f"{path}: base {parent_path} has a base of its own ({parent['base']}); only one level is allowed")
    return _merge(parent, values), parent_places | places


def _read(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """Values of a YAML file, and the line of each key."""
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}{_nearest(path.name, _yaml_names(path.parent))}")
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    places: dict[Location, str] = {}
    try:
        _note_places(node, (), path, places)
    except RecursionError:
        raise ConfigError(f"{path}: a value contains itself; expected no alias (*name) inside the value that it stands for") from None
    return values, places


def _yaml_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []


def _note_places(node: yaml.Node | None, location: Location, path: Path, places: dict[Location, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            line = key.start_mark.line + 1
            if here in places:
                raise ConfigError(f"{path}:{line}: key {'.'.join(map(str, here))} is given twice, first at {places[here]}")
            places[here] = f"{path}:{line}"
            _note_places(value, here, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[(*location, index)] = f"{path}:{value.start_mark.line + 1}"
            _note_places(value, (*location, index), path, places)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        old = parent.get(key)
        same_section = isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name")
        merged[key] = _merge(old, value) if same_section and isinstance(old, dict) else value
    return merged


def _apply_override(values: dict[str, Any], places: dict[Location, str], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected dotted.key=value, for example train.seed=1")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {_short(override)}: the value is not valid YAML: {error}") from None
    location: Location = ()
    section: Any = values
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in parents:
        location = (*location, part)
        if isinstance(section, list) and isinstance(part, int) and part < len(section):
            section = section[part]
        elif isinstance(section, dict):
            if not isinstance(section.get(part), dict | list):
                section[part] = {}
            section = section[part]
        else:
            raise ConfigError(f"override {override!r}: there is no {'.'.join(map(str, location))} in the config")
    try:
        section[last] = value
    except (IndexError, TypeError):
        raise ConfigError(f"override {override!r}: {key} is not a key or an index of the config") from None
    places[(*location, last)] = f"override {override}"


def _report(root: type[BaseModel], path: str, places: dict[Location, str], error: ValidationError) -> str:
    problems = [_describe(root, path, places, detail) for detail in error.errors(include_url=False, include_context=True)]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {path}:\n" + "\n".join(f"  {problem}" for problem in problems)


def _describe(root: type[BaseModel], path: str, places: dict[Location, str], detail: ErrorDetails) -> str:
    location = _without_tags(root, detail["loc"])
    kind, context, got = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "name")
        got = got.get("name") if isinstance(got, dict) else got
    key = ".".join(map(str, location)) or "(whole file)"
    place = _place(places, location, path)
    match kind:
        case "extra_forbidden":
            names = _names_at(root, location[:-1])
            hint = _nearest(str(location[-1]), names) or _belongs_elsewhere(root, location)
            return f"{place}: unknown key {key} (value {_short(got)}){hint}. Allowed here: {', '.join(names) or 'nothing'}"
        case "missing":
            return f"{place}: missing key {key}{_doc(root, location)}"
        case "union_tag_invalid" | "union_tag_not_found" | "literal_error":
            allowed = re.findall(r"[^\s',]+(?=')|\d+", str(context.get("expected_tags") or context.get("expected", "")))
            allowed = allowed or [tag for model in _models_at(root, location[:-1]) for tag in _tags(model)]
            return f"{place}: {key} is {_short(got)}{_nearest(str(got), allowed)}. Allowed: {', '.join(allowed)}"
        case "value_error":
            message = str(context.get("error", detail["msg"]))
            return f"{place}: {key}: {message}"
        case "model_type" | "model_attributes_type":
            return f"{place}: {key} is {_short(got)}, expected keys: {', '.join(_names_at(root, location))}"
        case _:
            return f"{place}: {key} is {_short(got)}: {detail['msg'][0].lower()}{detail['msg'][1:]}{_doc(root, location)}"


def _place(places: dict[Location, str], location: Location, path: str) -> str:
    for end in range(len(location), 0, -1):
        if location[:end] in places:
            return places[location[:end]]
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.55)
    return f" (did you mean {close[0]}?)" if close else ""


def _belongs_elsewhere(root: type[BaseModel], location: Location) -> str:
    homes = [".".join(path) for path in _all_keys(root) if path[-1] == location[-1]]
    return f" (did you mean {' or '.join(homes[:2])}?)" if homes else ""


def _all_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for section in _sections(field.annotation):
            yield from _all_keys(section, (*prefix, name))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Models that `annotation` may hold: itself, members of a union, items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        return [model for part in get_args(annotation) for model in _sections(part)]
    return []


def _models_at(root: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    models = [root]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [section for field in fields for section in _sections(field.annotation)]
    return models


def _names_at(root: type[BaseModel], location: Location) -> list[str]:
    return sorted({name for model in _models_at(root, location) for name in model.model_fields})


def _tags(model: type[BaseModel]) -> list[str]:
    """Names that a section goes by."""
    field = model.model_fields.get("name")
    return [str(tag) for tag in get_args(field.annotation)] if field and get_origin(field.annotation) is Literal else []


def _without_tags(root: type[BaseModel], location: Location) -> Location:
    """Drop the union tags that pydantic puts into locations: ('objective', 'rectified_flow', 'shift') -> ('objective', 'shift')."""
    kept: Location = ()
    for part in location:
        models = _models_at(root, kept)
        is_tag = any(part in _tags(model) for model in models) and not any(part in model.model_fields for model in models)
        if not is_tag:
            kept = (*kept, part)
    return kept


def _doc(root: type[BaseModel], location: Location) -> str:
    names = [part for part in location if not isinstance(part, int)]
    for model in _models_at(root, tuple(names[:-1])):
        field = model.model_fields.get(str(names[-1])) if names else None
        if field and field.description:
            return f" ({' '.join(field.description.split())})"
    return ""
