"""Packages that only some commands need: imported where they are used, with an error that names the extra."""

import importlib
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
