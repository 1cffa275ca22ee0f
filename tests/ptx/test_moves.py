"""mov: registers and their parts, addresses, special registers."""

import itertools

import numpy as np
import pytest

from ptx.launch import Fault, Machine, Out, UnknownInstruction
from ptx.samples import THREADS, Kind, arrays, samples
from ptx.snippets import evaluate, run


@pytest.mark.parametrize(
    "name", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
)
def test_a_register_is_copied(name):
    kind = Kind("b" + name[1:])
    (a,) = samples(kind)
    got = evaluate(f"mov.{name} %d, %a;", {"d": kind.dtype}, **arrays((kind,), [a]))
    assert got["d"].tolist() == a


def test_constants():
    got = evaluate(
        "mov.u32 %d, 0xfffffff0; mov.s32 %e, -16; mov.f32 %f, 0f3fc00000; mov.f32 %g, 1.5;"
        " mov.f64 %h, 0.1; mov.b64 %i, -1; mov.u16 %j, 65535;",
        {
            "d": np.uint32,
            "e": np.int32,
            "f": np.float32,
            "g": np.float32,
            "h": np.float64,
            "i": np.int64,
            "j": np.uint16,
        },
    )
    firsts = {name: array[0].item() for name, array in got.items()}
    assert firsts == {
        "d": 0xFFFFFFF0,
        "e": -16,
        "f": 1.5,
        "g": 1.5,
        "h": 0.1,
        "i": -1,
        "j": 65535,
    }


def test_predicates():
    p = np.array([True, False] * 16)
    got = evaluate(
        "mov.pred %d, %p; mov.pred %e, !%p; mov.pred %f, 1; mov.pred %g, 0;",
        dict.fromkeys("defg", bool),
        p=p,
    )
    assert got["d"].tolist() == p.tolist()
    assert got["e"].tolist() == (~p).tolist()
    assert got["f"].all()
    assert not got["g"].any()


# The size of the whole and that of its parts.
PARTS = [(32, 16), (64, 32), (64, 16), (16, 8), (32, 8)]


@pytest.mark.parametrize(("whole", "part"), PARTS)
def test_parts_lie_lowest_first(whole, part):
    count = whole // part
    kinds = [Kind(f"b{part}")] * count
    columns = samples(*kinds)
    # A snippet has no registers of 8 bits: they go through 16.
    registers = ".reg .b8 %p<4>; .reg .b16 %h;" if part == 8 else f".reg .b{part} %p<4>;"
    fill = "cvt.u8.u16 %p{i}, %{name};" if part == 8 else "mov.b{part} %p{i}, %{name};"
    inputs = arrays([Kind("b16")] * count if part == 8 else kinds, columns)
    fills = " ".join(fill.format(i=i, name=name, part=part) for i, name in enumerate(inputs))
    names = ", ".join(f"%p{i}" for i in range(count))
    got = evaluate(
        f"{fills} mov.b{whole} %out, {{{names}}};",
        {"out": f"u{whole // 8}"},
        registers=registers,
        **inputs,
    )["out"]
    expected = [sum(v << i * part for i, v in enumerate(row)) for row in zip(*columns, strict=True)]
    assert got.tolist() == expected
    empty = "cvt.u16.u8 %{name}, %p{i};" if part == 8 else "mov.b{part} %{name}, %p{i};"
    outputs = {f"o{i}": "u2" if part == 8 else f"u{part // 8}" for i in range(count)}
    empties = " ".join(empty.format(i=i, name=name, part=part) for i, name in enumerate(outputs))
    back = evaluate(f"mov.b{whole} {{{names}}}, %a; {empties}", outputs, registers=registers, a=got)
    assert [column.tolist() for column in back.values()] == columns


def test_128_bits():
    low, high = samples(Kind("b64"), Kind("b64"))
    got = evaluate(
        "mov.b128 %q, {%a, %b}; mov.b128 {%c, %d}, %q; mov.b128 {%e, %f, %g, %h}, %q;"
        " mov.b128 %q, {%e, %f, %g, %h}; mov.b128 {_, %i}, %q;",
        {"c": np.uint64, "d": np.uint64, **dict.fromkeys("efgh", np.uint32), "i": np.uint64},
        registers=".reg .b128 %q;",
        **arrays((Kind("b64"),) * 2, [low, high]),
    )
    assert got["c"].tolist() == low
    assert got["d"].tolist() == got["i"].tolist() == high
    words = [got[name].tolist() for name in "efgh"]
    assert [a | b << 32 for a, b in zip(words[0], words[1], strict=True)] == low
    assert [a | b << 32 for a, b in zip(words[2], words[3], strict=True)] == high


def test_parts_may_be_left_out_and_be_constants():
    a = np.arange(32, dtype=np.uint64) * 0x1_0000_0001 + (5 << 32)
    got = evaluate(
        "mov.b64 {_, %d}, %a; mov.b64 {%e, _}, %a; mov.b64 %f, {%e, 7}; mov.b32 {%g, %h}, 0x20001;",
        {"d": np.uint32, "e": np.uint32, "f": np.uint64, "g": np.uint16, "h": np.uint16},
        a=a,
    )
    lanes = np.arange(32)
    assert got["d"].tolist() == (lanes + 5).tolist()
    assert got["e"].tolist() == lanes.tolist()
    assert got["f"].tolist() == (lanes + (7 << 32)).tolist()
    assert set(got["g"].tolist()) == {1}
    assert set(got["h"].tolist()) == {2}


def test_the_address_of_shared_memory_is_in_its_own_space():
    got = evaluate(
        "mov.u32 %d, smem; mov.u64 %e, smem; mov.u32 %f, smem+12;"
        " st.shared.u32 [smem+12], 77; ld.shared.u32 %g, [%f];",
        {"d": np.uint32, "e": np.uint64, "f": np.uint32, "g": np.uint32},
        a=np.zeros(1, np.uint32),
    )
    assert got["d"] == got["e"]
    assert got["f"] == got["d"] + 12
    assert got["d"] % 1024 == 0
    assert got["d"] > 0
    assert got["g"] == 77


# ---- Special registers


def kernel(names, declared="", before=""):
    """A kernel that writes registers to a row of its own for each thread of the grid."""
    reads = "\n".join(
        f"mov.pred %p, {name}; selp.u64 %v, 1, 0, %p; st.global.u64 [%at+{8 * i}], %v;"
        if name == "%is_explicit_cluster"
        else f"mov.u64 %v, {name}; st.global.u64 [%at+{8 * i}], %v;"
        if wide
        else f"mov.u32 %w, {name}; cvt.u64.u32 %v, %w; st.global.u64 [%at+{8 * i}], %v;"
        for i, (name, wide) in enumerate(names)
    )
    return f"""
    .version 8.8
    .target sm_90a
    .address_size 64
    {declared}
    .visible .entry k(.param .u64 out) {{
    .reg .b64 %at, %v, %row; .reg .b32 %w, %x, %y, %cta, %threads; .reg .pred %p;
    {before}
    mov.u32 %cta, %ctaid.z; mov.u32 %x, %nctaid.y; mov.u32 %y, %ctaid.y;
    mad.lo.u32 %cta, %cta, %x, %y;
    mov.u32 %x, %nctaid.x; mov.u32 %y, %ctaid.x;
    mad.lo.u32 %cta, %cta, %x, %y;
    mov.u32 %threads, %ntid.x; mov.u32 %x, %ntid.y; mul.lo.u32 %threads, %threads, %x;
    mov.u32 %x, %ntid.z; mul.lo.u32 %threads, %threads, %x;
    mul.lo.u32 %cta, %cta, %threads;
    mov.u32 %w, %tid.z; mov.u32 %x, %ntid.y; mov.u32 %y, %tid.y; mad.lo.u32 %w, %w, %x, %y;
    mov.u32 %x, %ntid.x; mov.u32 %y, %tid.x; mad.lo.u32 %w, %w, %x, %y;
    add.u32 %w, %w, %cta;
    ld.param.u64 %at, [out];
    mul.wide.u32 %row, %w, {8 * len(names)};
    add.u64 %at, %at, %row;
    {reads}
    ret;
    }}
    """


def read(names, grid, block, *, resident=4, declared="", before="", **options):
    """The columns of special registers, by name; a row a thread, the CTAs' one after the other."""
    names = [(name, name in ("%clock64", "%globaltimer", "%gridid")) for name in names]
    threads = int(np.prod(grid) * np.prod(block))
    out = np.zeros((threads, len(names)), np.int64)
    run(
        kernel(names, declared, before),
        grid,
        block,
        [Out("out", out)],
        machine=Machine(seed=2, resident=resident),
        **options,
    )
    return {name: out[:, i].tolist() for i, (name, _) in enumerate(names)}


def boxes(sizes):
    """Every index below three sizes, x fastest."""
    return [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(sizes)))]


def test_indices_of_threads_and_blocks():
    grid, block = (3, 2, 2), (5, 3, 4)
    names = [f"%{what}.{i}" for what in ("tid", "ntid", "ctaid", "nctaid") for i in "xyzw"]
    got = read(names, grid, block)
    expected = [
        (*tid, 0, *block, 0, *ctaid, 0, *grid, 0)
        for ctaid, tid in itertools.product(boxes(grid), boxes(block))
    ]
    assert list(zip(*got.values(), strict=True)) == expected


def test_lanes_and_warps():
    masks = [f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")]
    got = read(["%laneid", "%warpid", "%nwarpid", *masks], (2,), (72,))
    threads = np.tile(np.arange(72), 2)
    assert got["%laneid"] == (threads % 32).tolist()
    assert got["%warpid"] == (threads // 32).tolist()
    assert min(got["%nwarpid"]) >= 3
    for i, lane in enumerate(threads % 32):
        chosen = {
            "eq": [n for n in range(32) if n == lane],
            "lt": [n for n in range(32) if n < lane],
            "le": [n for n in range(32) if n <= lane],
            "gt": [n for n in range(32) if n > lane],
            "ge": [n for n in range(32) if n >= lane],
        }
        for which, bits in chosen.items():
            assert got[f"%lanemask_{which}"][i] == sum(1 << n for n in bits)


CLUSTERS = [
    "%clusterid.x", "%clusterid.y", "%clusterid.z",
    "%nclusterid.x", "%nclusterid.y", "%nclusterid.z",
    "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z",
    "%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z",
    "%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster",
]  # fmt: skip


@pytest.mark.parametrize("cluster", [(2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_clusters(cluster):
    grid = (4, 2, 2)
    got = read(CLUSTERS, grid, (1,), cluster=cluster)
    expected = [
        (
            *(i // c for i, c in zip(ctaid, cluster, strict=True)),
            *(n // c for n, c in zip(grid, cluster, strict=True)),
            *(inside := tuple(i % c for i, c in zip(ctaid, cluster, strict=True))),
            *cluster,
            inside[0] + cluster[0] * (inside[1] + cluster[1] * inside[2]),
            int(np.prod(cluster)),
            1,
        )
        for ctaid in boxes(grid)
    ]
    assert list(zip(*got.values(), strict=True)) == expected


def test_a_grid_without_clusters_has_clusters_of_one():
    got = read(CLUSTERS, (2, 3), (1,))
    expected = [(x, y, 0, 2, 3, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0) for y in range(3) for x in range(2)]
    assert list(zip(*got.values(), strict=True)) == expected


def test_multiprocessors_are_as_many_as_resident_blocks():
    got = read(["%smid", "%nsmid", "%gridid"], (9,), (1,), resident=3)
    assert set(got["%nsmid"]) == {3}
    assert set(got["%smid"]) <= set(range(3))
    assert len(set(got["%gridid"])) == 1


def test_sizes_of_shared_memory():
    names = ["%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size"]
    declared = ".extern .shared .align 16 .b8 more[]; .shared .align 4 .b8 own[2048];"
    before = "mov.u32 %w, own; mov.u32 %w, more;"
    got = read(names, (1,), (1,), declared=declared, before=before, shared=1000)
    assert got["%dynamic_smem_size"] == [1000]
    assert got["%total_smem_size"] == [3072]  # 3048 in units of 128
    assert got["%aggr_smem_size"] == [3072 + 1024]
    declared = ".shared .align 4 .b8 own[300];"
    got = read(names, (1,), (1,), declared=declared, before="mov.u32 %w, own;")
    assert got["%dynamic_smem_size"] == [0]
    assert got["%total_smem_size"] == [384]


def test_clocks_run_and_seconds_do_not_pass():
    loop = "mov.u32 %w, 0; again: add.u32 %w, %w, 1; setp.lt.u32 %p, %w, 5000; @%p bra again;"
    names = [
        "%clock",
        "%clock_hi",
        "%clock64",
        "%globaltimer",
        "%globaltimer_lo",
        "%globaltimer_hi",
    ]
    first, later = (read(names, (1,), (1,), before=before) for before in ("", loop))
    for name in ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo"):
        assert 15000 <= later[name][0] - first[name][0] < 20000
    assert first["%globaltimer"][0] > 0
    assert first["%clock_hi"] == [0]
    timer = first["%globaltimer_lo"][0] | first["%globaltimer_hi"][0] << 32
    assert 0 < timer - first["%globaltimer"][0] < 100


def test_cvt_reads_special_registers():
    got = evaluate(
        "cvt.u64.u32 %d, %laneid; cvt.u32.u16 %e, %tid.x; cvt.u16.u32 %f, %tid.x;"
        " cvt.s32.s8 %g, %tid.x; mov.u16 %h, %tid.x;",
        {"d": np.uint64, "e": np.uint32, "f": np.uint16, "g": np.int32, "h": np.uint16},
        a=np.zeros(THREADS, np.uint32),
    )
    threads = np.arange(THREADS)
    assert got["d"].tolist() == (threads % 32).tolist()
    assert got["e"].tolist() == got["f"].tolist() == got["h"].tolist() == threads.tolist()
    assert got["g"].tolist() == threads.astype(np.int8).tolist()


# ---- What has no value, and what isn't there


@pytest.mark.parametrize(
    "code",
    [
        "mov.u64 %d, %x;",
        "mov.b64 %d, {%a, %h};",
        "mov.b64 {%h, _}, %x; mov.b64 %d, {%a, %h};",
        "mov.b64 %x, {%a, %h}; mov.b64 {_, %h}, %x; mov.b64 %d, {%a, %h};",
        "mov.b64 %x, {%a, %h}; mov.b64 %x, %y; mov.b64 {%h, _}, %x; mov.b64 %d, {%a, %h};",
        "mov.b64 %x, {%a, %h}; add.u64 %x, %x, 0; mov.b64 {%h, _}, %x; mov.b64 %d, {%a, %h};",
        "mov.b64 %x, {%a, %h}; mov.b64 {%i, %j, _, %k}, %x; mov.b64 %d, {%i, %j, %i, %k};",
    ],
)
def test_what_is_undefined_stays_so(code):
    with pytest.raises(Fault, match="undefined"):
        evaluate(
            code,
            {"d": np.uint64},
            registers=".reg .b64 %x, %y; .reg .b32 %h; .reg .b16 %i, %j, %k;",
            a=np.zeros(32, np.uint32),
        )


@pytest.mark.parametrize(
    "code",
    [
        "mov.b64 %x, {%a, %h}; mov.b64 {%d, _}, %x;",
        "mov.b64 %x, {%h, %a}; mov.b64 {_, %d}, %x;",
        "mov.b64 %x, {%a, %h}; mov.b64 {%i, %j, _, _}, %x; mov.b32 %d, {%i, %j};",
        "mov.b64 %x, {%a, %h}; setp.ne.u32 %p, %a, 3; @%p mov.b64 %x, {%a, %h};"
        " mov.b64 {%d, %h}, %x;",
    ],
)
def test_a_part_that_has_a_value_keeps_it(code):
    a = np.arange(32, dtype=np.uint32) * 0x01234567
    registers = ".reg .b64 %x; .reg .b32 %h; .reg .b16 %i, %j; .reg .pred %p;"
    assert evaluate(code, {"d": np.uint32}, registers=registers, a=a)["d"].tolist() == a.tolist()


@pytest.mark.parametrize(
    "code",
    [
        "mov.u32 %d, %envreg3;",
        "mov.u32 %d, %pm0;",
        "mov.u64 %l, %tid.x;",
        "mov.u32 %d, %clock64;",
        "mov.u16 %h, %laneid;",
        "mov.f32 %d, %tid.x;",
        "mov.u32 %d, %is_explicit_cluster;",
        "mov.u32 %d, %h;",
        "mov.f16 %h, %h;",
        "mov.b8 %h, %h;",
        "mov.u64 %l, {%d, %d};",
        "mov.b64 %l, {%d, %d, %d};",
        "mov.b64 %l, {%h, %d};",
        "mov.b32 %d, {%d};",
        "mov.pred %p, %d;",
        "mov.b32.weak %d, %d;",
        "mov %d, %d;",
        "add.u32 %d, %tid.x, 1;",
        "cvt.rn.f32.u32 %d, %tid.x;",
    ],
)
def test_what_is_not_there_is_refused(code):
    with pytest.raises(UnknownInstruction, match=code.split(" ")[0]):
        evaluate(
            code,
            {"d": np.uint32},
            registers=".reg .b64 %l; .reg .b16 %h; .reg .pred %p;",
            a=np.zeros(32, np.uint32),
        )
