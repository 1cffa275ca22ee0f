"""The README names every file and the faults that there are, and its example is the source's."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SOURCES = [*sorted(FOLDER.glob("machine/*")), *sorted(FOLDER.glob("*.py"))]
# Literals that C++ and Python would join are joined.
TEXT = re.sub(r'"\s*\n\s*f?"', "", "\n".join(p.read_text(encoding="utf-8") for p in SOURCES))


def section(title):
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def test_every_file_has_a_room():
    """A header goes with the source of its name."""
    rooms = {
        Path(name).name for name in quoted(section("Rooms")) if name.endswith((".py", ".h", ".cpp"))
    }
    files = {path.name for path in SOURCES if not path.name.startswith(("test_", "__"))}
    assert rooms <= files
    assert {name for name in files - rooms if name.replace(".h", ".cpp") not in rooms} == set()


@pytest.mark.parametrize("row", re.findall(r"^\| (`.*?) \|", section("What a fault means"), re.M))
def test_every_fault_is_there(row):
    for message in quoted(row):
        for part in message.split("…"):
            assert part.strip(" .,") in TEXT


def test_the_example_is_the_source():
    example = re.search(r"```cpp\n(.*?)```", section("Add an instruction"), re.S)[1]
    source = (FOLDER / "machine" / "integer.cpp").read_text(encoding="utf-8")
    for line in example.splitlines():
        assert line.startswith("// PTX ISA") or line in source
