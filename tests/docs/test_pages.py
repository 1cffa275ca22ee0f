import pytest
from pages import blocks, commands, not_run, run, write_files

PAGE = """
```python
# some/file.py
a = 1
```

```python
print("one", 2)
```

```text
one ...
```

```sh
not run
```
"""


@pytest.fixture
def page(tmp_path):
    def write(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return write


def test_files_are_written_and_the_rest_is_run(page, tmp_path):
    path = page(PAGE)
    assert [(b.file, b.shown) for b in blocks(path)] == [
        ("some/file.py", None), (None, "one ...\n"),
    ]  # fmt: skip
    (written,) = write_files(path, tmp_path)
    assert written == tmp_path / "some/file.py"
    assert "a" not in run(path)


@pytest.mark.parametrize("shown", ["one 3", "one 2 ..."])
def test_what_is_shown_must_be_printed(page, shown):
    path = page(PAGE.replace("one ...", shown))
    with pytest.raises(AssertionError, match=rf"page.md:8 shows\n{shown}\n\nand prints\none 2"):
        run(path)


def test_what_is_marked_is_not_run(page):
    path = page("<!-- not run -->\n```python\n1 / 0\n```\n\n```sh\nls -l  # all\n# none\n```\n")
    assert blocks(path) == []
    assert not_run(path) == ["1 / 0\n"]
    assert commands(path) == ["ls -l"]
    assert "path" not in run(path)


def test_what_is_shown_of_a_file_is_an_error(page):
    path = page(PAGE.replace('print("one", 2)', "# another.py"))
    with pytest.raises(AssertionError, match=r"page.md:8: a file prints nothing"):
        run(path)


def test_what_is_printed_must_be_shown(page):
    path = page(PAGE.replace("```text\none ...\n```", ""))
    with pytest.raises(AssertionError, match=r"page.md:8 prints what is not shown:\none 2"):
        run(path)


def test_an_error_names_the_line_of_the_page(page):
    with pytest.raises(ZeroDivisionError) as raised:
        run(page("words\n\n```python\n1 / 0\n```\n"))
    assert raised.traceback[-1].lineno + 1 == 4
