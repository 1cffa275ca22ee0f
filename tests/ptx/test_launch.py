"""What a launch may be: sizes, directives, arguments, tensors; what is refused, each in one sentence."""

import re

import numpy as np
import pytest
import torch

from ptx import Fault, In, InOut, Machine, Out, Program, PtxError, TensorMap, build, launch
from ptx.limits import shared_limit

HEAD = ".version 9.0\n.target {target}\n.address_size 64\n"
# Stores what a special register holds, one number a thread.
STORE = HEAD + (
    ".visible .entry store(.param .u64 out)\n{directives}\n{{\n"
    ".reg .b64 %at, %offset; .reg .b32 %tid, %ctaid, %ntid, %value;\n{shared}\n"
    "ld.param.u64 %at, [out]; mov.u32 %tid, %tid.x; mov.u32 %ctaid, %ctaid.x; mov.u32 %ntid, %ntid.x;\n"
    "mad.lo.u32 %tid, %ctaid, %ntid, %tid; mul.wide.u32 %offset, %tid, 4; add.u64 %at, %at, %offset;\n"
    "mov.u32 %value, {special};\nst.global.u32 [%at], %value;\nret;\n}}\n"
)
LOOP = (
    HEAD.format(target="sm_90a")
    + """.visible .entry loop(.param .u64 out) {
.reg .b64 %at; .reg .b32 %i;
ld.param.u64 %at, [out]; mov.u32 %i, 0;
again:
add.u32 %i, %i, 1;
bra again;
}"""
)
SPIN = (
    HEAD.format(target="sm_90a")
    + """.visible .entry spin(.param .u64 flag) {
.reg .b64 %at; .reg .b32 %i; .reg .pred %set;
ld.param.u64 %at, [flag];
again:
ld.acquire.gpu.global.u32 %i, [%at];
setp.eq.u32 %set, %i, 1;
@!%set bra again;
ret; }"""
)
DEADLOCK = (
    HEAD.format(target="sm_90a")
    + """.visible .entry deadlock() {
.reg .b32 %i; .reg .pred %first;
mov.u32 %i, %tid.x; setp.lt.u32 %first, %i, 32;
@%first bar.sync 1, 64;
bar.sync 0;
ret; }"""
)
TAKES = (
    HEAD.format(target="sm_90a")
    + """.visible .entry takes(
.param .u64 .ptr .global .align 4 x, .param .align 64 .b8 desc[128], .param .u32 n, .param .f32 a)
{ ret; }"""
)


def store(
    grid, block, special="%tid.x", directives="", shared="", target="sm_90a", machine=None, **how
):
    """The numbers that a grid stores."""
    text = STORE.format(target=target, directives=directives, special=special, shared=shared)
    out = np.zeros((int(np.prod(grid)), int(np.prod(block))), np.uint32)
    program = Program.from_text(text, "store")
    (machine or Machine()).launch(program, grid, block, [Out("out", out)], **how)
    return out


def refused(sentence, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


class TestSizes:
    @pytest.mark.parametrize(
        "sizes", [(0,), (2, 0), (), (1, 1, 1, 1), (-1,), (1.0,), 4, None, "4"], ids=str
    )
    @pytest.mark.parametrize("what", ["grid", "block", "cluster"])
    def test_what_is_no_size(self, what, sizes):
        if (what, sizes) == ("cluster", None):
            pytest.skip("the kernel's own")
        how = {"grid": (1,), "block": (1,)} | {what: sizes}
        with refused(f"loop: {what} is {sizes}, expected one to three positive integers"):
            Machine().launch(Program.from_text(LOOP, "loop"), arguments=[0], **how)

    def test_integers_of_numpy(self):
        assert store((np.int64(2),), (np.uint8(3),)).tolist() == [[0, 1, 2]] * 2

    @pytest.mark.parametrize(
        ("grid", "block", "sentence"),
        [
            ((1,), (1025,), "a block of (1025, 1, 1) has 1025 threads, more than 1024"),
            ((1,), (32, 33), "a block of (32, 33, 1) has 1056 threads, more than 1024"),
            ((1,), (1, 1, 65), "a block of (1, 1, 65) is more than (1024, 1024, 64)"),
            ((1, 65536), (1,), "a grid of (1, 65536, 1) is more than (2147483647, 65535, 65535)"),
            ((2**31,), (1,), "a grid of (2147483648, 1, 1) is more than (2147483647, 65535, 65535)"),
        ],
        ids=str,
    )  # fmt: skip
    def test_beyond_what_cuda_launches(self, grid, block, sentence):
        with refused(f"loop: {sentence}"):
            Machine().launch(Program.from_text(LOOP, "loop"), grid, block, [0])

    def test_the_largest_block(self):
        assert store((1,), (1024,))[0].tolist() == list(range(1024))

    def test_as_reqntid_says(self):
        assert store((1,), (40,), directives=".reqntid 40").shape == (1, 40)
        assert store((1,), (4, 1), directives=".reqntid 4, 1, 1").shape == (1, 4)
        with refused("store: a block of (32, 1, 1) is not what .reqntid says, 40"):
            store((1,), (32,), directives=".reqntid 40")
        with refused("store: a block of (8, 1, 1) is not what .reqntid says, 4, 2"):
            store((1,), (8,), directives=".reqntid 4, 2")
        two = TAKES.replace("{ ret", ".reqntid 4, 2\n{ ret")
        Machine().launch(Program.from_text(two, "takes"), (1,), (4, 2), [0, bytes(128), 0, 0])

    def test_up_to_maxntid(self):
        """Its numbers' product is the limit."""
        assert store((1,), (64,), directives=".maxntid 8, 8").shape == (1, 64)
        with refused("store: a block of (65, 1, 1) has 65 threads, more than .maxntid's 64"):
            store((1,), (65,), directives=".maxntid 8, 8")


class TestClusters:
    def test_the_kernels_own(self):
        ranks = store((4,), (1,), "%cluster_ctarank", ".reqnctapercluster 2")
        assert ranks.ravel().tolist() == [0, 1, 0, 1]

    def test_the_callers(self):
        ranks = store((6,), (1,), "%cluster_ctarank", cluster=(3,))
        assert ranks.ravel().tolist() == [0, 1, 2] * 2
        assert store((16,), (1,), "%cluster_nctarank", cluster=(16,)).ravel().tolist() == [16] * 16

    @pytest.mark.parametrize(
        ("cluster", "directives", "sentence"),
        [
            ((4,), ".reqnctapercluster 2",
             "a cluster of (4, 1, 1) is not what .reqnctapercluster says, 2"),
            ((1,), ".reqnctapercluster 2, 1, 1",
             "a cluster of (1, 1, 1) is not what .reqnctapercluster says, 2, 1, 1"),
            ((17,), "", "a cluster of (17, 1, 1) has 17 CTAs, more than 16"),
            ((4,), ".maxclusterrank 2",
             "a cluster of (4, 1, 1) has 4 CTAs, more than .maxclusterrank's 2"),
            ((3,), "", "a grid of (8, 1, 1) is not made of clusters of (3, 1, 1)"),
            ((1, 2), "", "a grid of (8, 1, 1) is not made of clusters of (1, 2, 1)"),
            (None, ".reqnctapercluster 3", "a grid of (8, 1, 1) is not made of clusters of (3, 1, 1)"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_is_refused(self, cluster, directives, sentence):
        with refused(f"store: {sentence}"):
            store((8,), (1,), directives=directives, cluster=cluster)


class TestSharedMemory:
    def test_the_chip_is_that_of_the_target(self):
        assert shared_limit("sm_75") == 64 * 1024
        assert shared_limit("sm_80") == 163 * 1024
        assert shared_limit("sm_86") == shared_limit("sm_120a") == 99 * 1024
        assert shared_limit("sm_90a") == shared_limit("sm_100f") == 227 * 1024

    @pytest.mark.parametrize(("target", "limit"), [("sm_80", 166_912), ("sm_90a", 232_448)])
    def test_up_to_the_last_byte(self, target, limit):
        """What aligns a launch's own memory to 1,024 bytes behind the kernel's is not the kernel's."""
        shared = ".shared .b8 own[16];"
        code = "%dynamic_smem_size;\nmov.u64 %at, own; mov.u64 %at, given; ld.param.u64 %at, [out]"
        how = {"special": code, "shared": shared, "target": target}

        def dynamic(size):
            text = STORE.format(directives="", **how)
            text = text.replace(".visible", ".extern .shared .b8 given[];\n.visible", 1)
            out = np.zeros(1, np.uint32)
            program = Program.from_text(text, "store")
            Machine().launch(program, (1,), (1,), [Out("out", out)], shared=size)
            return out[0]

        assert dynamic(limit - 16) == limit - 16
        with refused(
            f"store: needs 16 + {limit - 15} bytes of shared memory, and the chip has {limit}"
        ):
            dynamic(limit - 15)

    def test_a_kernel_that_uses_none_of_it(self):
        text = STORE.format(target="sm_90a", directives="", special="%dynamic_smem_size", shared="")
        out = np.zeros(1, np.uint32)
        Machine().launch(Program.from_text(text, "store"), (1,), (1,), [Out("out", out)], shared=48)
        assert out[0] == 48

    @pytest.mark.parametrize("shared", [-1, 1.5, None])
    def test_what_is_no_size(self, shared):
        with refused(f"loop: shared is {shared}, expected bytes of dynamic shared memory"):
            Machine().launch(Program.from_text(LOOP, "loop"), (1,), (1,), [0], shared=shared)

    def test_another_chip(self):
        with refused("loop: needs 0 + 200 bytes of shared memory, and the chip has 100"):
            Machine(shared_limit=100).launch(
                Program.from_text(LOOP, "loop"), (1,), (1,), [0], shared=200
            )


class TestArguments:
    def launch(self, *arguments):
        Machine().launch(Program.from_text(TAKES, "takes"), (1,), (1,), list(arguments))

    x = In("x", np.zeros((16, 16), np.float32))
    tensor_map = TensorMap(x, box=(4, 4))

    def test_those_that_fit(self):
        self.launch(self.x, self.tensor_map, 3, 0.5)
        self.launch(0, bytes(128), np.int32(3), np.float16(0.5))

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ((), "takes takes 4 arguments, not 0: x (u64), desc (128 bytes), n (u32), a (f32)"),
            ((x, tensor_map, 3, 0.5, 1),
             "takes takes 4 arguments, not 5: x (u64), desc (128 bytes), n (u32), a (f32)"),
            ((x.array, tensor_map, 3, 0.5),
             "takes: argument x is a bare tensor, expected In, Out or InOut of it"),
            ((torch.zeros(3), tensor_map, 3, 0.5),
             "takes: argument x is a bare tensor, expected In, Out or InOut of it"),
            ((tensor_map, tensor_map, 3, 0.5), "takes: argument x is a tensor map, expected u64"),
            ((x, x, 3, 0.5), "takes: argument desc is the tensor x, expected 128 bytes"),
            ((x, tensor_map, x, 0.5), "takes: argument n is the tensor x, expected u32"),
            ((x, tensor_map, 3, x), "takes: argument a is the tensor x, expected f32"),
            ((x, bytes(127), 3, 0.5), "takes: argument desc has 127 bytes, expected 128"),
            ((x, tensor_map, 2**32, 0.5),
             "takes: argument n is 4294967296, expected an integer of 32 bits"),
            ((x, tensor_map, 3, "1"), "takes: argument a is '1', expected a number"),
        ],
    )  # fmt: skip
    def test_those_that_do_not(self, arguments, sentence):
        with refused(sentence, PtxError):
            self.launch(*arguments)

    def test_the_bytes_of_all_parameters(self):
        with refused("store takes 8 bytes of parameters, not 7", PtxError):
            text = STORE.format(target="sm_90a", directives="", special="%tid.x", shared="")
            Machine().start(Program.from_text(text, "store"), (1,), (1,), bytes(7))


class TestTensors:
    @pytest.mark.parametrize(
        ("array", "sentence"),
        [
            (np.zeros(8)[::-1], "x has negative strides, which no kernel can be given"),
            (torch.zeros(8, device="meta"), "x is on meta, expected a tensor on the CPU"),
            (torch.zeros(8).to_sparse(), "x has layout torch.sparse_coo, expected torch.strided"),
            ([1.0, 2.0], "x is of type list, expected a NumPy array or a PyTorch tensor"),
            (None, "x is of type NoneType, expected a NumPy array or a PyTorch tensor"),
            (np.array(["a", None], object), "x is an array of object that no kernel can read"),
            (np.zeros(4, "i4,i1")["f0"], "x is an array of int32 that no kernel can read"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_what_is_refused(self, array, sentence):
        with refused(sentence, PtxError):
            Machine().region(In("x", array))

    def test_one_that_is_written_overlaps_another(self):
        text = TAKES.replace(".param .u32 n", ".param .u64 y").replace("takes", "two")
        program, whole = Program.from_text(text, "two"), np.zeros(64, np.float32)

        def call(one, other):
            Machine().launch(program, (1,), (1,), [one, bytes(128), other, 1])

        call(In("x", whole), In("y", whole[4:]))
        call(InOut("x", whole), InOut("y", whole))
        call(InOut("x", whole[:32]), In("y", whole[32:]))
        for one, other in (
            (InOut("x", whole), In("y", whole)), (In("x", whole[:33]), InOut("y", whole[32:])),
        ):  # fmt: skip
            with refused("two: x and y overlap, and one is written", PtxError):
                call(one, other)

    def test_an_unwritten_element_is_named(self):
        """Of a part of a tensor only its own elements count."""
        text = STORE.format(target="sm_90a", directives="", special="9", shared="")
        program, whole = Program.from_text(text, "store"), np.zeros((3, 8), np.uint32)
        with refused("store: 16 bytes of out are never written, the first in [1, 0]", Fault):
            Machine().launch(program, (1,), (4,), [Out("out", whole[:2, 1:5])])
        assert whole.tolist() == [[0, 9, 9, 9, 9, 0, 0, 0], [0] * 8, [0] * 8]

    @pytest.mark.parametrize("of", [Out, InOut])
    def test_what_lies_between_its_elements_is_not_its_own(self, of):
        text = STORE.format(target="sm_90a", directives="", special="9", shared="")
        program, whole = Program.from_text(text, "store"), np.zeros((3, 8), np.uint32)
        sentence = r"stores 4 bytes at out\[0, 4\], which lie between its elements"
        with pytest.raises(Fault, match=sentence):
            Machine().launch(program, (1,), (5,), [of("out", whole[:2, 1:5])])
        Machine().launch(program, (1,), (5,), [of("out", whole[0, 1:6])])


class TestTheMachine:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"resident": 0}, "resident is 0, expected an integer from 1 to 2**31 - 1"),
            ({"resident": 2.0}, "resident is 2.0, expected an integer from 1 to 2**31 - 1"),
            ({"most_steps": 0}, "most_steps is 0, expected an integer from 1 to 2**31 - 1"),
            ({"most_silent": -1}, "most_silent is -1, expected an integer from 1 to 2**31 - 1"),
            ({"seed": -1}, "seed is -1, expected an integer from 0 to 2**64 - 1"),
            ({"seed": None}, "seed is None, expected an integer from 0 to 2**64 - 1"),
            ({"late": "never"}, "late is 'never', expected one of late, random, soon"),
        ],
        ids=str,
    )
    def test_options_that_are_refused(self, options, sentence):
        with refused(sentence):
            Machine(**options)

    @pytest.mark.parametrize("name", ["", "CXX"])
    def test_no_compiler(self, monkeypatch, name):
        monkeypatch.delenv("CXX", raising=False)
        if name:
            monkeypatch.setenv("CXX", "no-such-compiler")
        else:
            monkeypatch.setattr(build.shutil, "which", lambda name: None)
        named = "no-such-compiler" if name else "g++"
        sentence = f"executing PTX needs a C++ compiler: there is no {named} (CXX names it)"
        with refused(sentence, RuntimeError):
            build.library()

    def test_no_such_kernel(self):
        with refused("there is no kernel add; the module's kernels: loop", PtxError):
            Program.from_text(LOOP, "add")


class TestKernelsThatDoNotEnd:
    def test_a_loop(self):
        with pytest.raises(Fault) as caught:
            Machine(seed=1, most_steps=1000).launch(
                Program.from_text(LOOP, "loop"), (3,), (64,), [0]
            )
        said, *standing = str(caught.value).split("\n")
        assert said == "loop: has not ended after 1000 steps"
        place = r"  (\d+) threads at line (\d+) \(CTA \d warp \d lane 0\): (.*)"
        places = [re.fullmatch(place, line).groups() for line in standing]
        assert sum(int(threads) for threads, _, _ in places) == 3 * 64
        assert {at[1:] for at in places} <= {("8", "add.u32 %i, %i, 1;"), ("9", "bra again;")}

    def test_a_flag_that_nobody_raises(self):
        flag = np.zeros(1, np.int32)
        with pytest.raises(Fault) as caught:
            Machine(most_silent=2000, resident=1).launch(
                Program.from_text(SPIN, "spin"), (2,), (32,), [InOut("flag", flag)]
            )
        said, *standing = str(caught.value).split("\n")
        assert said == "spin: nothing has changed for 2000 steps: those who spin wait for ever"
        assert "  CTAs that have not started: 1" in standing
        assert any(re.match("  32 threads at line ", line) for line in standing)

    def test_a_barrier_that_some_do_not_reach(self):
        with pytest.raises(Fault) as caught:
            Machine().launch(Program.from_text(DEADLOCK, "deadlock"), (1,), (64,), [])
        said, *standing = str(caught.value).split("\n")
        assert said == "deadlock: everyone waits for ever"
        assert standing == [
            "  32 threads at line 7 (CTA 0 warp 0 lane 0): @%first bar.sync 1, 64;",
            "  32 threads at line 8 (CTA 0 warp 1 lane 0): bar.sync 0;",
        ]


class TestTrace:
    def trace(self, of, text=None, machine=None):
        text = text or STORE.format(target="sm_90a", directives="", special="%laneid", shared="")
        out = np.zeros((2, 40), np.uint32)
        program = Program.from_text(text, text.split(".entry ")[1].split("(")[0])
        return (
            (machine or Machine()).launch(program, (2,), (40,), [Out("out", out)], trace=of).trace
        )

    def test_of_one_thread(self):
        lines = self.trace((1, 37)).splitlines()
        assert lines[1] == "9 mov.u32 0x25"
        assert lines[2] == "9 mov.u32 0x1"
        assert lines[4] == f"10 mad.lo.u32 {1 * 40 + 37:#x}"
        assert lines[-3:] == ["11 mov.u32 0x5", "12 st.global.u32", "13 ret"]

    def test_up_to_a_fault(self):
        text = STORE.format(
            target="sm_90a", directives="", special="1;\n@%first mov.u32 %value, 2", shared=""
        ).replace(".reg .b32", ".reg .pred %first; .reg .b32", 1)
        with pytest.raises(Fault, match="is guarded by an undefined predicate") as caught:
            self.trace((0, 0), text, Machine(resident=1))
        assert caught.value.trace.splitlines()[-1] == "11 mov.u32 0x1"

    def test_of_a_long_run_the_end(self):
        with pytest.raises(Fault, match="has not ended") as caught:
            self.trace(
                (0, 0), LOOP, Machine(resident=1, most_steps=4_000_000, most_silent=5_000_000)
            )
        first, second, *_, last = caught.value.trace.splitlines()
        assert first == "0 earlier instructions are left out"
        assert re.fullmatch(r"8 add.u32 0x[0-9a-f]+|9 bra", second)
        assert re.fullmatch(r"8 add.u32 0x[0-9a-f]+|9 bra", last)
        assert len(caught.value.trace) < launch._TRACE - 1

    @pytest.mark.parametrize(
        ("of", "sentence"),
        [
            ((2, 0), "trace is of CTA 2, and the grid has 2"),
            ((0, 40), "trace is of thread 40, and the block has 40"),
            ((0, -1), "trace is (0, -1), expected a CTA and a thread"),
            ((0,), "trace is (0,), expected a CTA and a thread"),
            (3, "trace is 3, expected a CTA and a thread"),
        ],
    )
    def test_what_is_refused(self, of, sentence):
        with refused(sentence):
            self.trace(of)


def test_a_fault_names_the_variable_in_shared_memory():
    text = (
        HEAD.format(target="sm_90a")
        + """.visible .entry race() {
    .reg .b64 %base, %at; .reg .b32 %i; .shared .b32 first[4]; .shared .b32 second[128];
    mov.u32 %i, %tid.x; mul.wide.u32 %at, %i, 4; mov.u64 %base, first; mov.u64 %base, second;
    add.u64 %at, %base, %at;
    st.shared.u32 [%at], %i;
    st.shared.u32 [second+12], %i;
    ret; }"""
    )
    program = Program.from_text(text, "race")
    with pytest.raises(Fault, match=r"with no (barrier|__syncwarp) between") as caught:
        Machine().launch(program, (1,), (64,), [])
    said, source, variable = str(caught.value).split("\n")
    assert "shared memory at 28 " in said
    assert re.fullmatch(r"  \d+: st\.shared\.u32 .*;", source)
    assert variable == "  shared memory at 28: second + 12 bytes"
