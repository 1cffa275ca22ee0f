"""Makes pages to be browsed offline: README and ``docs/`` as HTML, every public name from its docstring.

    make docs                       # python docs/build.py build/docs
    xdg-open build/docs/index.html

Links between the pages lead to their HTML, all other files that they link to are copied along.
"""

import argparse
import html
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.html",
    "docs/README.md": "pages.html",
    **{
        f"docs/{name}.md": f"{name}.html"
        for name in (
            "guide", "adapters", "fine-tuning", "distributed", "trainers", "scaling", "peft",
            "quantized", "backends", "performance", "exactness", "environment", "glossary",
            "add-a-backend", "add-a-format",
        )
    },
    "CONTRIBUTING.md": "contributing.html",
    "tests/ptx/README.md": "ptx.html",
    "CHANGELOG.md": "changelog.html",
}  # fmt: skip
"""From the checkout → into the folder of the pages."""
MODULES = (
    "lorafast",
    "lorafast.functional",
    "lorafast.nn",
    "lorafast.reference",
    "lorafast.reference.contract",
    "lorafast.operands",
    "lorafast.parallel",
    "lorafast.backends",
    "lorafast.integrations.transformers",
    "lorafast.integrations.lightning",
)
"""Those whose names are public."""
_API = "api/lorafast.html"
_LINK = re.compile(r'(?<=[ ])(href|src|srcset)="([^"#:]+)(#[^"]*)?"')
_STYLE = """\
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 70rem;
       padding: 1rem 1.5rem 4rem; color: #1f2328; background: #fff }
nav { border-bottom: 1px solid #d1d9e0; padding-bottom: .6rem; font-size: .9rem }
nav a { margin-right: .9rem; white-space: nowrap }
a { color: #0969da; text-decoration: none }
a:hover { text-decoration: underline }
code, pre { font: .86em/1.45 ui-monospace, monospace; background: #f3f4f6; border-radius: 4px }
code { padding: .1em .3em }
pre { padding: .8rem 1rem; overflow-x: auto }
pre code { padding: 0; font-size: 1em }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #d1d9e0; padding: .3rem .6rem; text-align: left; vertical-align: top }
img { max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { color: #d1d7e0; background: #0d1117 }
  a { color: #4493f8 }
  code, pre { background: #1b222b }
  nav, th, td { border-color: #3d444d }
}"""


def build(folder: Path) -> None:
    """All pages, in ``folder``.

    Raises:
        ValueError: a page links to a file that isn't there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in PAGES.items():
        (folder / target).write_text(_page(source, folder), encoding="utf-8")
    _api(folder / "api")


def _page(source: str, folder: Path) -> str:
    import markdown2

    path = ROOT / source
    extras = ["tables", "fenced-code-blocks", "header-ids", "cuddled-lists"]
    body = markdown2.markdown(path.read_text(encoding="utf-8"), extras=extras)

    def linked(match: re.Match[str]) -> str:
        name, link, anchor = match.groups()
        return f'{name}="{_target(link, path, folder)}{anchor or ""}"'

    title = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert title is not None, f"{source} has no title"
    links = [
        (PAGES["README.md"], "lorafast"), ("guide.html", "guide"), ("peft.html", "PEFT"),
        ("backends.html", "backends"), ("performance.html", "performance"),
        ("exactness.html", "exactness"), ("glossary.html", "glossary"), (_API, "API"),
        ("pages.html", "all pages"),
    ]  # fmt: skip
    nav = "".join(f'<a href="{link}">{name}</a>' for link, name in links)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title[1])}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<nav>{nav}</nav>\n{_LINK.sub(linked, str(body))}\n</body>\n</html>\n"
    )


def _target(link: str, page: Path, folder: Path) -> str:
    """Where a link of ``page`` leads in ``folder``; what is no page is copied there."""
    path = Path(os.path.normpath(page.parent / link))
    if not path.exists():
        raise ValueError(f"{page.name} links to {link}, which isn't there")
    inside = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        inside = f"{inside}/README.md"
    if inside in PAGES:
        return PAGES[inside]
    copy = folder / "files" / inside
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)
    return f"files/{inside}"


def _api(folder: Path) -> None:
    import pdoc
    import pdoc.render

    import lorafast

    pdoc.render.configure(
        docformat="google",
        template_directory=ROOT / "docs" / "template",
        footer_text=f"lorafast {lorafast.__version__}",
    )
    first, *others = MODULES
    # Without what lies below it, of which most is not public.
    pdoc.pdoc(first, rf"!{first}\..*", *others, output_directory=folder)


def main() -> int:
    """Builds; 2 if a package for it is missing."""
    parser = argparse.ArgumentParser(description="Makes the documentation as HTML.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "docs")
    folder: Path = parser.parse_args().folder
    try:
        build(folder)
    except ImportError as error:
        print(f"{error}: pip install '.[docs]'", file=sys.stderr)
        return 2
    print(f"{folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
