"""The reference page is what the config classes say, and every key says what it means or is named by its section."""

from pathlib import Path

from dit.config.reference import page

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_in_docs_is_current() -> None:
    committed = (ROOT / "docs" / "reference" / "config.md").read_text()
    assert committed == page(), "run: python -m dit.config.reference > docs/reference/config.md"


def test_the_page_knows_ranges_variants_and_defaults() -> None:
    text = page()
    assert "| `zero_stage` | `0` / `1` / `2` / `3` | `1` |" in text
    assert "| `lr` | float > 0 | required |" in text
    assert "### ConsistencyConfig" in text
    assert text.count("### OptimizerConfig") == 1
