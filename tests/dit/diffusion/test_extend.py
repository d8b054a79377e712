"""The code in docs/extend runs, and passes the tests that it holds."""

import re
import runpy
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[3] / "docs" / "extend"


@pytest.mark.parametrize("page", ["path", "objective", "sampler", "guidance", "cascade", "distillation"])
def test_the_code_of_the_page_holds(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert "assert " in blocks[0]
    (tmp_path / "page.py").write_text(blocks[0])
    runpy.run_path(str(tmp_path / "page.py"))
