"""Reading a config: what YAML allows and a run does not."""

import pytest

from data_pipelines.config import ExecutorConfig
from data_pipelines.config_file import ConfigError, load_run


@pytest.mark.parametrize("text", ["slurm_options: &x [*x]", "a: &x {b: [1, *x]}", "&x {a: *x}"])
def test_a_value_that_contains_itself_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_run(ExecutorConfig, str(path))
    assert str(raised.value).startswith(f"{path}: a value contains itself; expected no alias")
    assert "\n" not in str(raised.value)


def test_an_alias_of_another_value_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("slurm_options: [&x --partition=cpu, *x]")
    assert load_run(ExecutorConfig, str(path)).slurm_options == ["--partition=cpu"] * 2
