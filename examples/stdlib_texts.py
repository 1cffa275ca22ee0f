"""Real sentences with a label: the texts of this Python's own standard library, by area.

Docstrings, read from the source files without importing them, and the paragraphs of the language
reference in `pydoc_data.topics`. The label is the area of the library a text comes from. Training and
test set are split by module (a topic of the language reference counts as one), so no module is in
both; a package's modules may be on both sides, and texts are left as they are, so some of them name
their module.

`load_functions` gives the docstrings of functions, without a label.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Top-level modules of the standard library by area, after the chapters of its documentation.
AREAS = {
    "data types and text": """
        _collections_abc _pydecimal _strptime bisect calendar codecs collections copy datetime
        dataclasses difflib encodings enum fractions functools gettext graphlib heapq locale
        numbers operator pprint random re reprlib sre_compile sre_parse statistics string
        stringprep textwrap types weakref zoneinfo""",
    "files and system": """
        _osx_support _pyio argparse bz2 cmd curses filecmp fileinput fnmatch genericpath getopt
        getpass glob gzip io linecache logging lzma ntpath nturl2path optparse os pathlib platform
        posixpath shlex shutil stat tarfile tempfile zipfile""",
    "concurrency": """
        _threading_local asyncio asyncore asynchat concurrent contextvars multiprocessing queue
        sched selectors signal subprocess threading""",
    "network protocols": """
        cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "data formats": """
        aifc base64 binhex chunk colorsys configparser copyreg csv dbm email html imghdr json
        mailbox mailcap mimetypes netrc pickle pickletools plistlib quopri shelve sndhdr sqlite3
        sunau tomllib uu wave xdrlib xml""",
    "development tools": """
        _bootsubprocess ast bdb cProfile code codeop compileall dis distutils doctest ensurepip
        imp importlib inspect modulefinder opcode pdb pkgutil profile pstats py_compile pyclbr
        pydoc runpy symtable tabnanny timeit token tokenize trace traceback tracemalloc typing
        unittest venv warnings zipapp zipimport""",
    "graphical interfaces": "idlelib tkinter turtle turtledemo",
    "language reference": "",  # the paragraphs of pydoc_data.topics
}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
MIN_WORDS = 5
TEST_PER_AREA = 120
TEST_PER_MODULE = 10  # so that the test set has many modules and no large one stands for its area
TRAIN_PER_AREA = 500


@dataclass(frozen=True)
class Example:
    text: str
    label: int
    module: str


@dataclass(frozen=True)
class Function:
    """A function of the library: its name, with those of the classes around it, and its docstring."""

    module: str
    name: str
    text: str


def docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def named_functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of the functions below `node`, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        name = within
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{within}.{child.name}" if within else child.name
            if not isinstance(child, ast.ClassDef):
                yield name, ast.get_docstring(child) or ""
        yield from named_functions(child, name)


def sources(library: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (area, module, source) for the modules named in AREAS."""
    area_of = {name: area for area, names in AREAS.items() for name in names.split()}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        area = area_of.get(parts[0])
        if area is None or SKIPPED_FOLDERS.intersection(parts):
            continue
        yield area, ".".join(parts).removesuffix(".__init__"), path.read_bytes()


def library_texts(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (area, module, docstring) for the modules named in AREAS."""
    for area, module, source in sources(library):
        for text in docstrings(source):
            yield area, module, text


def topic_texts(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (area, topic, paragraph) from pydoc's copy of the language reference."""
    path = library / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                for paragraph in text.split("\n\n"):
                    yield "language reference", f"topic {topic}", paragraph


def stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def collect(library: Path) -> dict[str, dict[str, list[str]]]:
    """Return area -> module -> texts, without repeated and very short texts."""
    seen: set[str] = set()
    found: dict[str, dict[str, list[str]]] = {area: {} for area in AREAS}
    for texts in (library_texts(library), topic_texts(library)):
        for area, module, raw in texts:
            text = " ".join(raw.split())
            if len(text.split()) >= MIN_WORDS and text not in seen:
                seen.add(text)
                found[area].setdefault(module, []).append(text)
    return found


def split_by_module(
    found: dict[str, dict[str, list[str]]],
) -> tuple[list[Example], list[Example]]:
    """Return (train, test): per area, whole modules in the order of a hash go to the test set."""
    train: list[Example] = []
    test: list[Example] = []
    for label, modules in enumerate(found.values()):
        held_out: list[Example] = []
        kept: list[Example] = []
        for module in sorted(modules, key=stable_hash):
            examples = [Example(text, label, module) for text in modules[module]]
            examples.sort(key=lambda example: stable_hash(example.text))
            if len(held_out) < TEST_PER_AREA:
                held_out += examples[:TEST_PER_MODULE]
            else:
                kept += examples
        test += held_out[:TEST_PER_AREA]
        train += sorted(kept, key=lambda example: stable_hash(example.text))[:TRAIN_PER_AREA]
    return train, test


def load_texts() -> tuple[list[Example], list[Example], list[str]]:
    """Return (train, test, areas), without areas that this Python comes without."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {area: modules for area, modules in collect(library).items() if len(modules) > 1}
    train_set, test_set = split_by_module(found)
    if not (train_set and test_set):
        sys.exit(f"No sources of the standard library in {library}.")
    return train_set, test_set, list(found)


def load_functions() -> list[Function]:
    """Return the functions with a docstring of MIN_WORDS or more, without special methods.

    Of two of the same name in a module, or of the same docstring anywhere, the first is kept.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    found: list[Function] = []
    for _, module, source in sources(library):
        for name, raw in named_functions(ast.parse(source)):
            text = " ".join(raw.split())
            last = name.rpartition(".")[2]
            special = last.startswith("__") and last.endswith("__")
            if special or len(text.split()) < MIN_WORDS or seen & {text, f"{module}:{name}"}:
                continue
            seen |= {text, f"{module}:{name}"}
            found.append(Function(module, name, text))
    if not found:
        sys.exit(f"No sources of the standard library in {library}.")
    return found
