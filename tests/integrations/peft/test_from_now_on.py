"""accelerate() and accelerated() in threads, tasks and generators: whose models are fast, until when."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("peft")

from peft.tuners.lora.model import LoraModel
from peft_twins import fast_layers, peft_model

import lorafast


def place():
    return vars(LoraModel)["_create_new_module"]


STOCK = place()


def is_fast():
    """Whether a model that is made here and now is fast."""
    return bool(fast_layers(peft_model()))


@pytest.fixture(autouse=True)
def _nothing_stays():
    assert place() is STOCK
    yield
    lorafast.restore()
    assert place() is STOCK


@pytest.fixture
def other_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(is_fast).result()  # a thread starts when it is first needed
        yield lambda do: pool.submit(do).result()


def test_a_block_is_for_its_own_thread(other_thread):
    with lorafast.accelerated():
        assert is_fast()
        assert not other_thread(is_fast)
    assert place() is STOCK


def test_accelerate_is_for_every_thread(other_thread):
    lorafast.accelerate()
    assert is_fast()
    assert other_thread(is_fast)
    other_thread(lorafast.restore)
    assert not is_fast()
    assert place() is STOCK


def test_restore_leaves_the_blocks_of_others(other_thread):
    with lorafast.accelerated():
        other_thread(lorafast.accelerate)
        other_thread(lorafast.restore)
        assert is_fast()
        assert not other_thread(is_fast)


def test_twice_accelerated_is_restored_at_once():
    lorafast.accelerate()
    lorafast.accelerate()
    lorafast.restore()
    assert place() is STOCK
    lorafast.restore()
    with lorafast.accelerated():
        assert is_fast()


def test_blocks_that_overlap_in_threads():
    """Neither ends the other's, in whatever order they end."""
    steps = threading.Barrier(2, timeout=30)
    found = {}

    def first():
        with lorafast.accelerated():
            steps.wait()
            steps.wait()
        found["first, after"] = is_fast()
        steps.wait()

    def second():
        steps.wait()
        with lorafast.accelerated():
            steps.wait()
            steps.wait()
            found["second, within"] = is_fast()
        found["second, after"] = is_fast()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    assert found == {"first, after": False, "second, within": True, "second, after": False}
    assert place() is STOCK


def test_many_threads():
    def work(i):
        with lorafast.accelerated():
            inside = is_fast()
        return inside, is_fast()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(40))) == {(True, False)}
    assert place() is STOCK


def test_tasks():
    """A block is for its task and those that it starts, which may live on when it has ended."""

    async def run():
        found = {}
        inside, ended = asyncio.Event(), asyncio.Event()

        async def block():
            async def started_within():
                found["started within"] = is_fast()
                await ended.wait()
                found["lives on"] = is_fast()

            with lorafast.accelerated():
                child = asyncio.create_task(started_within())
                inside.set()
                await asyncio.sleep(0)
                found["within"] = is_fast()
            ended.set()
            await child

        async def beside():
            await inside.wait()
            found["beside"] = is_fast()

        await asyncio.gather(block(), beside())
        return found

    assert asyncio.run(run()) == {
        "beside": False, "started within": True, "within": True, "lives on": False,
    }  # fmt: skip
    assert place() is STOCK


def block_in_a_generator():
    with lorafast.accelerated():
        yield is_fast()
        yield is_fast()


def test_generators_that_end_in_another_order():
    one, other = block_in_a_generator(), block_in_a_generator()
    assert next(one)
    assert next(other)
    one.close()
    assert next(other)
    assert place() is not STOCK
    other.close()
    assert not is_fast()


def test_a_generator_that_is_closed_in_another_context():
    generator = block_in_a_generator()
    assert contextvars.copy_context().run(next, generator)
    assert not is_fast()
    generator.close()
    assert place() is STOCK


def test_a_generator_that_is_forgotten():
    generator = block_in_a_generator()
    assert next(generator)
    del generator
    assert place() is STOCK


def test_an_exception_in_a_nested_block():
    with lorafast.accelerated():
        with pytest.raises(KeyError), lorafast.accelerated():
            raise KeyError
        assert is_fast()
    assert not is_fast()
