"""Packages that only some commands need: imported where they are used, with an error that names the extra; and what they load."""

import importlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import UserError


def optional(module: str, purpose: str, extra: str = "curate") -> Any:
    """Import `module`. Raises UserError that says for what it is needed and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        how = f"pip install -c constraints.txt -e '.[{extra}]'"
        raise UserError(f"{purpose} needs the package {package} ({error}); install it in the project's folder: {how}") from error


def check_loaded(key: str, path: str, found: Mapping[str, Any], spared: str | None = "pooler") -> None:
    """Raise UserError that names `key` if a library gave random values to weights that the files at `path` lack or have in another shape.

    found: what `from_pretrained` says of its loading. spared: part of the names of weights that nobody asks for their output.
    """
    lacking = [name for name in found["missing_keys"] if spared is None or spared not in name]
    lacking += [entry[0] for entry in found["mismatched_keys"]]
    if lacking:
        raise UserError(f"{key}: the weights in {path} lack {len(lacking)} tensors of the model, such as {min(lacking)}")
