import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.configs import (
    OPERATIONS,
    SHARED_MEMORY,
    LaunchConfig,
    split_k,
    why_invalid,
)
from lorafast.kernels.common.plan import expand_backward_launch
from lorafast.kernels.tables import find, table_of
from lorafast.kernels.tables.find import nearest_architecture

ROWS = [
    (capability, op, row)
    for capability in SHARED_MEMORY
    for op in OPERATIONS
    for row in table_of(capability)[op]
]
GOOD = LaunchConfig(64, 64, 32, 16, num_warps=4, num_stages=3)


@pytest.mark.parametrize(
    ("capability", "op", "row"),
    ROWS,
    ids=lambda v: "-".join(map(str, v[:5])) if type(v) is tuple else v,
)
def test_every_row_is_valid_on_its_architecture(capability, op, row):
    bits, *_, config = row
    assert why_invalid(op, config, bits // 8, capability) is None


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("r", [16, 32, 64])
def test_partial_sums_of_ds_are_at_most_half_of_dy(capability, r):
    """Each column block leaves one: narrow ones would write more than dy has."""
    M, N = 8192, 4096
    config = find("expand_backward", capability, torch.bfloat16, M, N, N, r)
    launch = expand_backward_launch(config, M, N, r, sms=108, precision="ieee")
    col_groups, _, _ = launch.grid
    assert col_groups * M * r * 4 <= M * N * 2 / 2


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_dtype_is_served_with_and_without_tma(capability, op):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tma in (False, True):
            config = find(op, capability, dtype, 100, 1000, 1000, 20, tma)
            assert tma or not config.descriptors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 48}, "block_m is 48: tl.dot needs powers of two of at least 16"),
        ({"block_r": 8}, "block_r is 8"),
        ({"num_warps": 3}, "num_warps is 3, expected 1, 2, 4, 8 or 16"),
        ({"num_stages": 0}, "num_stages is 0, expected 1 to 32"),
        ({"block_k": 1024}, "bytes of shared memory, more than the 101376 that sm_86"),
        ({"block_m": 256, "block_n": 256, "block_k": 16}, "registers a thread"),
        ({"parts": 3}, "parts is 3, expected 1, 2, 4 or 8"),
        ({"masked_parts": 8}, "masked_parts is 8, expected 1, 2, 4 or 8, of at least 16 columns"),
        ({"ctas_per_sm": 0}, "ctas_per_sm is 0, expected 1 to 32"),
        ({"helpers": -1}, "helpers is -1, expected 0 or more"),
        ({"descriptors": True}, "descriptors need TMA, which sm_86 lacks"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_is_wrong_is_said(change, reason):
    config = dataclasses.replace(GOOD, **change)
    assert reason in why_invalid("linear_expand", config, 2, 86)


def test_what_tma_can_not_is_said():
    config = dataclasses.replace(GOOD, descriptors=True, block_n=512, num_warps=16)
    assert "TMA takes at most 256" in why_invalid("linear_expand", config, 2, 100)


def test_an_unknown_architecture_is_said():
    assert "sm_75 is not among" in why_invalid("shrink", GOOD, 2, 75)


def test_an_unknown_device_is_served_by_the_newest_older_architecture():
    assert [nearest_architecture(sm) for sm in (80, 87, 89, 90, 103, 121)] == [
        80,
        86,
        89,
        90,
        100,
        120,
    ]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_smallest_rank_that_holds_the_calls_is_taken(op, capability):
    rows = [r for r in table_of(capability)[op] if r[0] == 16 and not r[5].descriptors]
    ranks = sorted({row[4] for row in rows})
    for rank in range(1, 257):
        taken = find(op, capability, torch.bfloat16, 8192, 4096, 4096, rank)
        bucket = next((r for r in ranks if rank <= r), ranks[-1])
        assert taken in [row[5] for row in rows if row[4] == bucket]


def test_the_nearest_row_is_taken():
    def block_m(M):
        return find("linear_expand", 90, torch.bfloat16, M, 4096, 4096, 16, True).block_m

    assert [block_m(M) for M in (1, 16, 31, 40, 64, 180, 200, 1024, 8192)] == [
        16, 16, 16, 64, 64, 64, 128, 128, 128,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tiles", "k_blocks", "splits"),
    [
        (132, 64, 1),
        (67, 64, 1),
        (66, 64, 2),
        (33, 64, 4),
        (16, 64, 8),
        (1, 64, 8),
        (1, 7, 1),
        (1, 8, 2),
    ],
)
def test_k_is_split_where_tiles_are_few(tiles, k_blocks, splits):
    assert split_k(132, tiles, k_blocks) == splits
