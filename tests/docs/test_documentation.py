"""README, CONTRIBUTING and the pages: their Python runs, their commands and links are there."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pages
import pytest

import lorafast

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, CONTRIBUTING, *PAGES]
OWN_TESTS = ("add-a-backend.md", "add-a-format.md")  # with folders to be imported from
NOT_RUN = {"distributed.md": 1, "trainers.md": 2}
COMMANDS = [(page, command) for page in TEXTS for command in pages.commands(page)]


def _name(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value


@pytest.mark.parametrize(
    "page", [p for p in TEXTS if pages.blocks(p) and p.name not in OWN_TESTS], ids=_name
)
def test_its_python_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    pages.run(page)


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_python_that_is_not_run_is_counted_and_parses(page):
    left_out = pages.not_run(page)
    assert len(left_out) == NOT_RUN.get(page.name, 0)
    for block in left_out:
        ast.parse(block)


def test_the_readme_takes_five_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=_name)
def test_a_command_is_one(page, command):
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)  # a variable
    program = words.pop(0).removeprefix(".venv/bin/")
    CHECKS[program](words)


def check_make(words):
    if shutil.which("make") is None:
        pytest.skip("make is not here")
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def check_pip(words):
    assert words[0] == "install"
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words[1:]:
        if not word.startswith("-"):
            where, extras = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", word).groups()
            assert where == "."
            assert set(filter(None, (extras or "").split(","))) <= {
                *project["optional-dependencies"]
            }


def check_lorafast(words):
    """Each option is one that the command has."""
    module = importlib.import_module(f"lorafast.cli.{words[0]}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.parse_args(words[1:])


def check_file(words):
    files = [word for word in words if "/" in word and not word.startswith("-")]
    assert files or words[:1] == ["-m"]
    for word in files:
        assert (ROOT / word).exists(), word


def check_hooks(words):
    assert words == ["install"]
    assert (ROOT / ".pre-commit-config.yaml").is_file()


CHECKS = {
    ".ci/run": lambda words: check_file([".ci/run"]),
    "lorafast": check_lorafast,
    "make": check_make,
    "pip": check_pip,
    "pre-commit": check_hooks,
    "pytest": check_file,
    "python": check_file,
}


@pytest.mark.parametrize("page", [*TEXTS, ROOT / "CHANGELOG.md"], ids=_name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if not re.match(r"https?:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_release_is_told_everywhere():
    version = lorafast.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+) – (\d{4}-\d\d-\d\d)$", changes, re.M)
    assert first is not None
    assert first[1] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{first[2]}"\n' in citation


def test_every_page_is_listed():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_every_backend_is_on_its_page():
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    for name in lorafast.backends():
        assert f"| `{name}` |" in text, name


VARIABLE = re.compile(r"LORAFAST_[A-Z]+(?:_[A-Z]+)*")


def read_variables():
    """Every environment variable of ours that the code names."""
    found = set()
    for folder in ("lorafast", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(VARIABLE.findall(path.read_text(encoding="utf-8")))
    for path in (ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"):
        text = path.read_text(encoding="utf-8")  # a macro that it defines is no variable
        found |= set(VARIABLE.findall(re.sub(rf"-D{VARIABLE.pattern}", "", text)))
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        text = path.read_text(encoding="utf-8")  # macros bear the prefix too
        found |= set(re.findall(rf"getenv\(\"({VARIABLE.pattern})\"\)", text))
    return found


def test_every_variable_that_is_read_is_on_the_page():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(LORAFAST_\w+)` \|", text, re.M))
    assert rows == read_variables()
    assert set(VARIABLE.findall(text)) == rows
