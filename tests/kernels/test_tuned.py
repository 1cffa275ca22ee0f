"""Records of ``lorafast tune``: those that can't serve are left out, those of several writers kept."""

import dataclasses
import json
import os
import re
import threading
import warnings

import pytest
import torch

pytest.importorskip("triton")

from helpers import assert_contract
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables import tuned

from lorafast.backends import registry
from lorafast.ops.problems import on_backend

CONFIG = LaunchConfig(16, 16, 32, 16, 1, 2)
KEY = tuned.Key("shrink", "float32", 20, 40, 40, 4)
RECORD = tuned.Record(KEY, "triton", CONFIG, {"aten": 2e-5, "triton": 1e-5})
DEEP = "[" * 100_000 + "]" * 100_000


def forget():
    tuned.load.cache_clear()
    tuned.nearest.cache_clear()
    registry.forget_plans()


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "tuned-interpreter.json"
    forget()


def spoil(fields, path, value):
    """The fields of a record with ``value`` at ``path``; ``...`` takes the place out."""
    *parents, last = path.split(".")
    for parent in parents:
        fields = fields[parent]
    if value is ...:
        del fields[last]
    else:
        fields[last] = value


def write(file, *entries):
    content = {"format": tuned._FORMAT, "versions": tuned.versions(), "records": entries}
    file.write_text(json.dumps(content))


BAD = [
    ("config.ctas_per_sm", 0, "ctas_per_sm is 0, expected 1 to"),
    ("config.ctas_per_sm", -1, "ctas_per_sm is -1, expected 1 to"),
    ("config.ctas_per_sm", 10**6, "ctas_per_sm is 1000000, expected 1 to"),
    ("config.block_k", -16, "block_k is -16: tl.dot needs powers of two"),
    ("config.block_k", 24, "block_k is 24"),
    ("config.block_k", 32.0, r"records\[0\].config.block_k is 32.0, expected a whole number"),
    ("config.block_k", "32", "block_k is '32', expected a whole number"),
    ("config.block_k", True, "block_k is True, expected a whole number"),
    ("config.block_k", 10**400, "block_k is 1000.*, expected a whole number"),
    ("config.block_n", 2**60, "block_n is 1152921504606846976: tl.dot needs"),
    ("config.block_m", 2**16, "bytes of shared memory"),
    ("config.num_warps", 3, "num_warps is 3"),
    ("config.num_stages", 10**15, "num_stages is 1000000000000000, expected 1 to"),
    ("config.num_stages", None, "num_stages is None, expected a whole number"),
    ("config.num_stages", ..., r"records\[0\].config has no num_stages"),
    ("config.descriptors", 1, "descriptors is 1, expected true or false"),
    ("config.block_q", 16, "config has a field 'block_q', which is not known"),
    ("config", [16, 16], r"config is \[16, 16\], expected an object"),
    ("key.operation", "sing", "operation is 'sing', expected one of shrink"),
    ("key.dtypes", "int8", "dtypes is 'int8', expected one or two of"),
    ("key.dtypes", "float16+float32+float32", "expected one or two of"),
    ("key.M", 0, "M is 0, expected at least 1"),
    ("key.K", 10**400, "key.K is 1000.*, expected a whole number"),
    ("key.r", [4], r"key.r is \[4\], expected a whole number"),
    ("key.r", "4", "key.r is '4', expected a whole number"),
    ("key.masked", 0, "key.masked is 0, expected true or false"),
    ("key", None, "key is None, expected an object"),
    ("key.aligned", "yes", "key.aligned is 'yes', expected true or false"),
    ("backend", "nobody", "backend is 'nobody', and there are times of aten, triton alone"),
    ("seconds", {}, "backend is 'triton', and there are times of nothing alone"),
    ("seconds", {"aten": 0.0}, "the time of aten is 0.0, expected seconds"),
    ("backend", ["aten"], r"backend is \['aten'\], expected a text"),
    ("seconds", {"aten": "fast"}, "seconds.aten is 'fast', expected a finite number"),
    ("seconds", {"aten": float("nan")}, "seconds.aten is nan, expected a finite number"),
    ("seconds", {"aten": 10**400}, "seconds.aten is 1000.*, expected a finite number"),
    ("seconds", {"aten": -1.0}, "the time of aten is -1.0, expected seconds"),
    ("seconds", [1.0], r"seconds is \[1.0\], expected an object"),
    ("choices", [3], r"choices is \[3\], expected an object"),
    ("choices", {"stages": "3"}, "choices.stages is '3', expected a whole number"),
    ("choices", {"stages": -1}, "stages is -1, expected 0 to 2147483647"),
    ("choices", {"stages": 2**31}, "stages is 2147483648, expected 0 to 2147483647"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), BAD, ids=[f"{path}-{str(value)[:12]}" for path, value, _ in BAD]
)
def test_a_bad_record_is_left_out_with_one_warning(file, path, value, said):
    bad, good = dataclasses.asdict(RECORD), dataclasses.asdict(RECORD)
    spoil(bad, path, value)
    good["key"]["M"] = 2000
    write(file, bad, good, bad)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert [record.key.M for record in tuned.load("interpreter")] == [2000]
        assert tuned.nearest("interpreter", KEY) is None
    (sentence,) = (str(one.message) for one in heard)
    assert sentence.startswith(f"{file}: 2 of 3 records are not used")
    assert re.search(said, sentence)


@pytest.mark.parametrize("entry", [None, 1, "shrink", [], {}], ids=str)
def test_an_entry_that_is_no_record_is_left_out(file, entry):
    write(file, entry, dataclasses.asdict(RECORD))
    with pytest.warns(UserWarning, match="1 of 2 records are not used"):
        assert tuned.load("interpreter") == (RECORD,)


def test_numbers_are_right_whatever_the_file_holds(file):
    entry = dataclasses.asdict(RECORD)
    entry["config"]["ctas_per_sm"] = 0
    write(file, entry)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    lora_A = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    with pytest.warns(UserWarning, match="ctas_per_sm is 0"):
        assert_contract(
            lambda run, cast: run.shrink(cast(x), cast(lora_A)), on_backend("triton"), torch.float32
        )


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", f'{{"format": {tuned._FORMAT}}}',
        DEEP, f'{{"format": {tuned._FORMAT}, "records": {DEEP}}}',
        '{"format": ' + "1" * 5000 + "}", "\ud800",
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_a_broken_file_is_ignored_with_one_warning(file, text):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert tuned.load("interpreter") == ()
        assert tuned.nearest("interpreter", KEY) is None
    assert [str(one.message).startswith(f"{file} can't be read (") for one in heard] == [True]
    assert len(str(heard[0].message)) < 600


@pytest.mark.parametrize("records", [None, 5, {"a": 1}, "ab"], ids=str)
def test_records_of_another_type_are_ignored_with_a_warning(file, records):
    content = {"format": tuned._FORMAT, "versions": tuned.versions(), "records": records}
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="can't be read|records are not used"):
        assert tuned.load("interpreter") == ()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for_nor_replaced(file, make):
    make(file)
    with pytest.warns(UserWarning, match="is not used: it is no regular file"):
        assert tuned.load("interpreter") == ()
    with pytest.raises(OSError, match="it is no regular file"):
        tuned.save("interpreter", [RECORD])
    assert not file.is_file()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_four_threads_that_save_at_once_lose_nothing(file):
    failures = []

    def save(thread):
        try:
            for i in range(10):
                key = dataclasses.replace(KEY, M=1 + 10 * thread + i)
                tuned.save("interpreter", [dataclasses.replace(RECORD, key=key)])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(record.key.M for record in tuned.load("interpreter")) == list(range(1, 41))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_record_takes_the_place_of_that_of_the_same_call(file):
    tuned.save("interpreter", [RECORD])
    tuned.save("interpreter", [dataclasses.replace(RECORD, backend="aten")])
    assert [record.backend for record in tuned.load("interpreter")] == ["aten"]


def test_saving_drops_what_can_not_be_used(file):
    write(file, {"key": 1}, dataclasses.asdict(RECORD))
    other = dataclasses.replace(RECORD, key=dataclasses.replace(KEY, M=999))
    tuned.save("interpreter", [other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.load("interpreter") == (RECORD, other)


def test_records_of_a_whole_backward_are_left_out_in_silence(file):
    """It is tuned in its parts; a file may have some all the same."""
    whole = dataclasses.asdict(RECORD)
    whole["key"] |= {"operation": "lora_linear_backward", "transposed": True}
    write(file, whole, dataclasses.asdict(RECORD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.load("interpreter") == (RECORD,)


def test_a_failed_write_leaves_the_file_and_nothing_else(file, monkeypatch):
    tuned.save("interpreter", [RECORD])
    kept = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        tuned.save("interpreter", [dataclasses.replace(RECORD, backend="aten")])
    assert file.read_bytes() == kept
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_tilde_is_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORAFAST_CACHE", "~/x")
    assert tuned.path_for("y").parent == tmp_path / "x"
    monkeypatch.delenv("LORAFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/z")
    assert tuned.path_for("y").parent == tmp_path / "z" / "lorafast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.path_for("y").parent == tmp_path / ".cache" / "lorafast"


def test_the_home_of_nobody_is_said_and_not_used(monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", "~nobody-of-this-name/x")
    with pytest.warns(UserWarning, match="what lorafast tune found is not used"):
        assert tuned.load("interpreter") == ()


def test_the_rules_are_those_of_the_device_of_that_name(monkeypatch):
    devices = {"Old": (8, 6), "Newer": (10, 3)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: list(devices)[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: list(devices.values())[i])
    config = LaunchConfig(128, 128, 64, 16, 8, 3, descriptors=True)
    key = tuned.Key("lora_linear", "bfloat16+float32", 8192, 4096, 4096, 16)
    record = tuned.Record(key, "triton", config, {"triton": 1e-4})
    for name in ("Newer", "Old", "absent"):
        tuned.save(name, [record])
    assert tuned.load("Newer") == tuned.load("absent") == (record,)
    with pytest.warns(UserWarning, match="descriptors need TMA, which sm_86 lacks"):
        assert tuned.load("Old") == ()
