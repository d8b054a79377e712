"""No code path of ours can execute what it reads: pickle, a shell, unsafe YAML and remote code are banned in the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("dit", "data_pipelines", "launch", "tests") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("strict", False)}


def violations(source: str) -> list[str]:
    """Describe every banned import, call and keyword in a module's text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_eval_mode = name.endswith(".eval")
            if name in CALLS and not is_eval_mode:
                found.append(f"{node.lineno}: {name}()")
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                    found.append(f"{node.lineno}: {keyword.arg}={keyword.value.value}")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_free_of_banned_calls(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(open('x'))",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run('true', shell=True)",
        "eval('1')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "np.load('x', allow_pickle=True)",
        "model.load_state_dict(state, strict=False)",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_the_check_finds_planted_violations(source: str) -> None:
    assert len(violations(source)) == 1
