"""Runs are read as every config file is; `data_pipelines.config_file` does it, since ingest is configured too."""

from data_pipelines.config_file import ConfigError, load_run, save_resolved

__all__ = ["ConfigError", "load_run", "save_resolved"]
