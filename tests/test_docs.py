"""The documents: every public name is in the API page, what is linked is there, the README stays short."""

import re
from pathlib import Path

import pytest

import stm_kernels

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def test_the_api_page_has_every_public_name_of_the_kernels():
    listed = re.findall(r"^ +- (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {*listed} == {*stm_kernels.__all__} - {"__version__"}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in PAGES if page.startswith("docs/") and f": {Path(page).name}" not in navigation]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    missing = [
        target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert not missing


def test_the_readme_is_short_and_its_picture_small():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1100
    assert "docs/demo.gif" in readme and (ROOT / "docs" / "demo.gif").stat().st_size < 1_500_000
