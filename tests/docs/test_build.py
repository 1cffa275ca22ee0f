"""``make docs``: every page, and every public name on a page."""

import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest

import lorafast

pytest.importorskip("pdoc")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _load()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    builder.build(folder)
    return folder


def public(module):
    """The names of a module that are for users."""
    own = getattr(module, "__all__", None)
    if own is not None:
        return own
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def page_of(name):
    return f"{name.replace('.', '/')}.html"


def test_every_module_that_users_import_has_a_page():
    assert {f"lorafast.{m}" for m in ("functional", "nn", "reference", "operands", "backends")} < {
        *builder.MODULES
    }


@pytest.mark.parametrize("name", builder.MODULES)
def test_every_public_name_is_on_a_page(site, name):
    module = importlib.import_module(name)
    page = (site / "api" / page_of(name)).read_text(encoding="utf-8")
    assert public(module)
    for member in public(module):
        value = getattr(module, member)
        if isinstance(value, types.ModuleType):
            assert (site / "api" / page_of(value.__name__)).is_file(), member
        else:
            assert f'id="{member}"' in page, member


def test_every_markdown_page_is_made(site):
    sources = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    others = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/ptx/README.md"}
    assert sources | others == {*builder.PAGES}
    for target in builder.PAGES.values():
        page = (site / target).read_text(encoding="utf-8")
        assert "<h1" in page
        assert "```" not in page


def test_every_link_leads_to_a_file_of_the_site(site):
    for target in builder.PAGES.values():
        page = (site / target).read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src|srcset)="([^"#:]+)[#"]', page):
            assert (site / link).is_file(), f"{target} links to {link}"
            assert not link.endswith(".md")


@pytest.mark.parametrize("name", builder.MODULES)
def test_a_module_links_to_all_others(site, name):
    page = site / "api" / page_of(name)
    text = page.read_text(encoding="utf-8")
    menu = text[: text.index("API Documentation")]
    links = re.findall(r'href="([^"#:]+\.html)"', menu)
    found = {(page.parent / link).resolve() for link in links}
    assert found >= {(site / "api" / page_of(other)).resolve() for other in builder.MODULES}
    assert (site / "index.html").resolve() in found
    assert all(path.is_file() for path in found)


def test_a_broken_link_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md links to docs/gone\.md"):
        builder._target("docs/gone.md", ROOT / "README.md", tmp_path)


def test_the_version_is_that_of_the_package(site):
    page = (site / "api" / "lorafast.html").read_text(encoding="utf-8")
    assert f"lorafast {lorafast.__version__}" in page
