"""The code of docs/extend/metric.md is the code that is tested here."""

from pathlib import Path

import pytest
import torch

from dit.evaluation.metrics import Batch
from tests.docs.sharpness import SHARPNESS, sharpness

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_the_tested_code() -> None:
    code = (ROOT / "tests" / "docs" / "sharpness.py").read_text().partition("# begin\n")[2].partition("# end")[0]
    assert f"```python\n{code}```" in (ROOT / "docs" / "extend" / "metric.md").read_text()


def test_the_example_measures_what_it_says() -> None:
    stripes = torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8)
    stripes[0, :, :, ::2] = 255  # every neighbour across differs, none down
    rows = SHARPNESS.rows(Batch(stripes, ["", ""], None))
    assert rows is not None
    assert rows.tolist() == [[0.5], [0.0]]
    figure = SHARPNESS.figures(rows, rows, 1)[""]
    assert (figure.value, figure.count) == (0.25, 2)
    blurred = torch.stack([stripes[0].float().roll(shift, dims=2) for shift in (0, 1)]).mean(0)[None].to(torch.uint8)
    assert float(sharpness(blurred)) < float(sharpness(stripes[:1])) == pytest.approx(0.5)
