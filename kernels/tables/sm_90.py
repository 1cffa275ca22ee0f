"""Launch configurations for sm_90 (H100, H200, GH200): what was fastest on an H100 in 16 bits, where no
variant of it spills, and rules for the rest. Two rows are not timed: of ``shrink`` that of 256 ranks is
one in which ptxas serializes no wgmma; of ``expand_backward`` that of 64 ranks, which serves more in
blocks, asks memory for the least by what executing it counts."""

from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables.find import Table

TUNED_ON: tuple[str, ...] = ("NVIDIA H100 80GB HBM3",)

TABLE: Table = {
    "shrink": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(64, 16, 128, 16, 4, 4, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 128, 32, 4, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 128, 64, 8, 4)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 16, 128, 128, 8, 3)),
        (16, 8192, 4096, 4096, 256, LaunchConfig(32, 16, 64, 256, 8, 3)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(64, 16, 32, 16, 4, 4, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 32, 32, 4, 4, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 32, 64, 8, 4, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 128, LaunchConfig(32, 16, 32, 128, 8, 3)),
    ),
    "linear_expand": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 64, LaunchConfig(128, 256, 64, 16, 8, 4,
            descriptors=True, flatten=True, parts=4, masked_parts=4, helpers=8)),
        (16, 512, 4096, 4096, 64, LaunchConfig(128, 128, 64, 16, 4, 6,
            descriptors=True, masked_parts=4)),
        (16, 64, 4096, 4096, 64, LaunchConfig(64, 32, 256, 16, 4, 4, descriptors=True)),
        (16, 16, 4096, 4096, 64, LaunchConfig(16, 32, 256, 16, 4, 5, descriptors=True)),
        (16, 512, 4096, 4096, 64, LaunchConfig(128, 128, 64, 16, 8, 3, masked_parts=4)),
        (16, 64, 4096, 4096, 64, LaunchConfig(64, 64, 64, 16, 4, 4)),
        (16, 16, 4096, 4096, 64, LaunchConfig(16, 64, 128, 16, 4, 4)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(64, 64, 16, 16, 8, 3)),
    ),
    "expand_backward": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(128, 256, 16, 16, 8, 3)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 256, 16, 32, 8, 4)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 256, 16, 64, 8, 3)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 64, 16, 16, 4, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 32, 16, 32, 8, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(32, 64, 16, 32, 4, 2)),
    ),
    "shrink_backward": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(64, 16, 128, 16, 8, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(128, 16, 128, 32, 8, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 128, 64, 8, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 16, 64, 128, 8, 3, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 16, 128, 16, 8, 3, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 16, 64, 32, 4, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(16, 16, 64, 64, 8, 3)),
    ),
    "expand": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(16, 128, 16, 16, 4, 2, ctas_per_sm=6)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(16, 128, 16, 32, 4, 2, ctas_per_sm=6)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(16, 128, 16, 64, 4, 2, ctas_per_sm=6)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(32, 128, 16, 128, 4, 2, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 256, LaunchConfig(64, 128, 16, 32, 8, 2, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 128, 16, 16, 8, 2, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 128, 16, 32, 8, 2, ctas_per_sm=2)),
        (32, 8192, 4096, 4096, 128, LaunchConfig(16, 128, 16, 16, 8, 1, ctas_per_sm=4)),
    ),
    "bottleneck": (
        # bits, M, K, N, widest bottleneck
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 128, 64, 64, 4, 4)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 64, 64, 128, 8, 3)),
        (16, 8192, 4096, 4096, 256, LaunchConfig(32, 64, 64, 256, 8, 3)),
        (16, 512, 4096, 4096, 64, LaunchConfig(16, 128, 64, 64, 4, 4)),
        (16, 512, 4096, 4096, 128, LaunchConfig(16, 64, 64, 128, 4, 3)),
        (16, 512, 4096, 4096, 256, LaunchConfig(16, 32, 32, 256, 4, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(32, 64, 32, 64, 4, 3)),
        (32, 512, 4096, 4096, 64, LaunchConfig(16, 64, 32, 64, 4, 3)),
        (32, 8192, 4096, 4096, 128, LaunchConfig(16, 32, 32, 128, 4, 3)),
    ),
    "bottleneck_backward": (
        # of its launch over columns: bits, M, K, N, widest bottleneck
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 128, 32, 8, 3)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 128, 64, 8, 3)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 16, 64, 128, 8, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 16, 64, 32, 8, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(16, 16, 64, 64, 8, 3)),
    ),
}  # fmt: skip
