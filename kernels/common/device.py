"""Device functions used by more than one kernel."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, APART: tl.constexpr = False):
    """``acc + a·b`` in float32; PRECISION applies to float32 operands.

    Where these keep all their digits a block is summed apart and added then, as with APART: one long
    sum of thousands of products would lose more of them than PyTorch's own GEMM does.
    """
    EXACT: tl.constexpr = a.dtype == tl.float32 and PRECISION != "tf32"
    if INTERPRETED:
        # The interpreter's dot takes the bits of bf16 for integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if EXACT or APART:
        # Without the last argument the compiler makes one long sum of it again.
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def low_rank_dot(
    a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, APART: tl.constexpr = False
):
    """``acc + a·b`` in float32 for a tile of x or dy and a factor: of one dtype, or float16 and float32.
    APART as in ``dot``.

    float16 fits into TF32, the other factor is the sum of two numbers in TF32 to 22 bits: their
    products lose nothing, on tensor cores. Those cut off what they add (an H100's dA of 8,192 rows was
    off by 20 times what float32 leaves), so a block is summed apart, its small half first.
    """
    if a.dtype == b.dtype:
        acc = dot(a, b, acc, PRECISION, INTERPRETED, APART)
    else:
        part = tl.zeros(acc.shape, dtype=tl.float32)
        if a.dtype == tl.float16:
            high, low = _split(b)
            a = a.to(tl.float32)
            part = dot(a, low, part, "tf32", INTERPRETED)
            part = dot(a, high, part, "tf32", INTERPRETED)
        else:
            high, low = _split(a)
            b = b.to(tl.float32)
            part = dot(low, b, part, "tf32", INTERPRETED)
            part = dot(high, b, part, "tf32", INTERPRETED)
        acc += part
    return acc


@triton.jit
def _split(x):
    """Two numbers in TF32 whose sum is ``x``, to 22 of its 24 bits."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, tl.where(tl.abs(x) == float("inf"), 0.0, x - high)  # infinity has no rest


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even."""
    if x.dtype != dtype:
        x = x.to(tl.float32)
        if INTERPRETED and dtype == tl.bfloat16:
            # The interpreter cuts the low bits off: round them away first. NaN and infinity stay.
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x)
        x = x.to(dtype)
    return x


@triton.jit
def factor(a, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """A or B as ``low_rank_dot`` takes it beside a tile of ``dtype``: rounded to it, but for float16."""
    if dtype != tl.float16:
        a = cast(a, dtype, INTERPRETED)
    elif a.dtype != tl.float16:
        a = a.to(tl.float32)
    return a


@triton.jit
def drop(x, keep, survivor_scale, INTERPRETED: tl.constexpr):
    """Dropout of a tile. float16 isn't scaled here, which would round: ``scale_sum`` scales the sum."""
    if x.dtype == tl.float16:
        x = tl.where(keep, x, 0.0)
    else:
        kept = tl.where(keep, x.to(tl.float32) * survivor_scale, 0.0)
        x = cast(kept, x.dtype, INTERPRETED)
    return x


@triton.jit
def scale_sum(acc, dtype: tl.constexpr, mask):
    """Scales a sum of tiles of ``dtype`` that ``drop`` hasn't; ``mask`` is None without dropout."""
    if mask is not None and dtype == tl.float16:
        acc *= mask.scale
    return acc


@triton.jit
def keep_mask(
    seed,
    rows,
    first_column,
    K,
    threshold,
    BLOCK: tl.constexpr,
):
    """The dropout mask of a tile ``[len(rows), BLOCK]`` whose columns start at ``first_column``.

    ``lorafast.reference.dropout`` defines it. ``first_column`` and BLOCK are multiples of 8, so that
    one Philox call serves eight neighbouring columns of the tile.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)  # [BLOCK / 8]
    counter = rows.to(tl.int64)[:, None] * tl.cdiv(K, 8) + groups[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter, n_rounds=7)  # [BLOCK_M, BLOCK / 8] each
    # Half-word h of a call belongs to column h of its group: low halves to even columns, high halves
    # to odd ones. Each interleave fills one more binary digit of the column, the last one first.
    even = tl.interleave(
        tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF)
    )
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd).to(tl.int32) >= threshold  # [BLOCK_M, BLOCK]


@triton.jit
def arrive(counter_ptr):
    """Counts this CTA. Returns how many were counted before it: it can load what they stored."""
    # All threads have stored before one of them counts, and none loads before it has counted.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def raise_flag(flag_ptr):
    """Raises a flag: a CTA that has waited for it can load what this one has stored."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(flag_ptr, INTERPRETED: tl.constexpr):
    """Waits until the flag is raised, and returns 0. Add it to an address: loads from there come later.

    If the flag isn't raised within two seconds it never will be, and the launch ends in an error.
    """
    if INTERPRETED:
        # CTAs run one by one: the flag is raised already, or this one would wait for ever.
        tl.device_assert(tl.load(flag_ptr) != 0, "waits for a program that comes later")
        waited = 0
    else:
        # Every thread polls for itself, so no barrier is needed. To the compiler it is one instruction:
        # a loop that it sees would keep it from pipelining the loads of the main loop.
        waited = tl.inline_asm_elementwise(
            """{
            .reg .pred raised, in_time;
            .reg .u64 since, now;
            ld.acquire.gpu.global.b32 $0, [$1];
            setp.ne.b32 raised, $0, 0;
            @raised bra done;
            mov.u64 since, %globaltimer;
            again:
            ld.acquire.gpu.global.b32 $0, [$1];
            setp.ne.b32 raised, $0, 0;
            @raised bra done;
            mov.u64 now, %globaltimer;
            sub.u64 now, now, since;
            setp.lt.u64 in_time, now, 2000000000;
            @in_time bra again;
            trap;
            done:
            bar.warp.sync 0xffffffff;
            sub.s32 $0, $0, 1;
            }""",
            "=r,l",
            [flag_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return waited


@triton.jit
def end_block(ptr, INTERPRETED: tl.constexpr):
    """Returns 0, behind a branch back that is never taken.

    A GEMM's flattened loop has the next tile's first steps beside the last ones of this: with both in
    one basic block ptxas serializes every ``wgmma`` of the loop. Who adds the 0 to an address begins
    another block. ptxas must not see that the branch isn't taken: the timer is never 0.
    """
    if INTERPRETED:
        zero = 0
    else:
        zero = tl.inline_asm_elementwise(
            """{
            .reg .pred never;
            .reg .u64 now;
            again:
            mov.u64 now, %globaltimer;
            setp.eq.u64 never, now, 0;
            @never bra again;
            mov.u32 $0, 0;
            }""",
            "=r,l",
            [ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return zero


@triton.jit
def sum_blocks(partials_ptr, offsets, inside, stride, count):
    """``Σᵢ partials[offsets + i·stride]``, added in the order of i: two runs give the same bits."""
    total = tl.load(partials_ptr + offsets, mask=inside, other=0.0)
    for i in tl.range(1, count, num_stages=1):
        # 64 bits: all partials together may pass 2**31 elements.
        start = tl.cast(i, tl.int64) * stride
        total += tl.load(partials_ptr + start + offsets, mask=inside, other=0.0)
    return total


@triton.jit
def _mask_words(seed, rows, first_column, K, GROUPS: tl.constexpr):
    """The four words of the mask of eight neighbouring columns, ``[rows, GROUPS]`` each."""
    groups = first_column // 8 + tl.arange(0, GROUPS)
    return _philox(seed, rows.to(tl.int64)[:, None] * tl.cdiv(K, 8) + groups[None, :])


@triton.jit
def drop_columns(x, seed, rows, first_column, K, threshold):
    """``x [len(rows), columns]`` with 0 where ``keep_mask`` drops, without a scale.

    Eight neighbouring columns are one thread's, as their call of Philox is: so no mask changes hands.
    """
    GROUPS: tl.constexpr = x.shape[1] // 8
    w0, w1, w2, w3 = _mask_words(seed, rows, first_column, K, GROUPS)
    # The last binary digit of a column, the half of a word, is split off first.
    even, odd = tl.split(tl.reshape(x, (x.shape[0], GROUPS, 2, 2, 2)))
    even02, even13 = tl.split(even)
    odd02, odd13 = tl.split(odd)
    e0, e2 = tl.split(even02)
    e1, e3 = tl.split(even13)
    o0, o2 = tl.split(odd02)
    o1, o3 = tl.split(odd13)
    even02 = tl.join(_low_kept(e0, w0, threshold), _low_kept(e2, w2, threshold))
    even13 = tl.join(_low_kept(e1, w1, threshold), _low_kept(e3, w3, threshold))
    odd02 = tl.join(_high_kept(o0, w0, threshold), _high_kept(o2, w2, threshold))
    odd13 = tl.join(_high_kept(o1, w1, threshold), _high_kept(o3, w3, threshold))
    both = tl.join(tl.join(even02, even13), tl.join(odd02, odd13))
    return tl.reshape(both, x.shape)


@triton.jit
def drop_pairs(acc, seed, rows, first_column, K, threshold):
    """The same for an accumulator, of which a thread has pairs of neighbouring columns: the words change
    hands, half as many as there are elements.
    """
    GROUPS: tl.constexpr = acc.shape[1] // 8
    w0, w1, w2, w3 = _mask_words(seed, rows, first_column, K, GROUPS)
    # Joined once each: what is joined twice changes hands twice.
    first = tl.join(w0, w2)[:, :, :, None]
    second = tl.join(w1, w3)[:, :, :, None]
    is_first = tl.arange(0, 2)[None, None, None, :] == 0
    words = tl.where(is_first, first, second)  # [rows, GROUPS, 2, 2]
    even, odd = tl.split(tl.reshape(acc, (acc.shape[0], GROUPS, 2, 2, 2)))
    both = tl.join(_low_kept(even, words, threshold), _high_kept(odd, words, threshold))
    return tl.reshape(both, acc.shape)


@triton.jit
def _philox(seed, counter):
    """``tl.randint4x(seed, counter, n_rounds=7)``, by products that give both of their words at once."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _low_kept(x, word, threshold):
    return tl.where((word & 0xFFFF).to(tl.int32) >= threshold, x, 0.0)


@triton.jit
def _high_kept(x, word, threshold):
    return tl.where((word >> 16).to(tl.int32) >= threshold, x, 0.0)
