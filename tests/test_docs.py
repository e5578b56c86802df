"""The documents: the API page says what the docstrings say, and what is linked is there."""

import re
import runpy
from pathlib import Path

import pytest

import stm_kernels

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def test_the_api_page_says_what_the_docstrings_say():
    page = runpy.run_path(str(ROOT / "docs" / "api.py"))["render"]()
    assert (ROOT / "docs" / "api.md").read_text() == page, "renew it: python docs/api.py"


def test_the_api_page_has_every_public_name_of_the_kernels():
    public = runpy.run_path(str(ROOT / "docs" / "api.py"))["PUBLIC"]
    assert {*public["stm_kernels"].split()} == {*stm_kernels.__all__} - {"__version__"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [
        target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert not missing


def test_the_picture_of_the_readme_is_small():
    assert "docs/demo.gif" in (ROOT / "README.md").read_text()
    assert (ROOT / "docs" / "demo.gif").stat().st_size < 1_500_000
