"""Launch configurations for sm_89 (L4, L40S, RTX 40): rules, none tuned on a device yet."""

from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables.find import Table

TUNED_ON: tuple[str, ...] = ()

TABLE: Table = {
    "shrink": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(64, 16, 64, 16, 4, 4, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 64, 32, 4, 4, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 64, 64, 8, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 16, 64, 128, 8, 3)),
        (16, 8192, 4096, 4096, 256, LaunchConfig(64, 16, 32, 256, 8, 3)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 16, 64, 16, 4, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 16, 64, 32, 8, 3)),
        (32, 8192, 4096, 4096, 128, LaunchConfig(32, 16, 32, 128, 8, 3)),
    ),
    "linear_expand": (
        # bits, M, K, N, largest rank
        (16, 512, 4096, 4096, 64, LaunchConfig(128, 128, 32, 16, 8, 4, masked_parts=4)),
        (16, 64, 4096, 4096, 64, LaunchConfig(64, 64, 64, 16, 4, 4)),
        (16, 16, 4096, 4096, 64, LaunchConfig(16, 64, 64, 16, 4, 4)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(64, 64, 16, 16, 8, 3)),
    ),
    "expand_backward": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(32, 256, 16, 16, 8, 4)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(32, 256, 16, 32, 8, 4)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(32, 256, 16, 64, 8, 3)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 64, 16, 16, 4, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 32, 16, 32, 8, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(32, 64, 16, 32, 4, 2)),
    ),
    "shrink_backward": (
        # bits, M, K, N, largest rank
        (16, 8192, 4096, 4096, 16, LaunchConfig(64, 16, 128, 16, 8, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 128, 32, 4, 3, ctas_per_sm=2)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 128, 64, 8, 3)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 16, 64, 128, 8, 3)),
        (32, 8192, 4096, 4096, 16, LaunchConfig(32, 16, 64, 16, 8, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 16, 64, 32, 8, 3)),
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
        (32, 8192, 4096, 4096, 128, LaunchConfig(16, 128, 16, 16, 4, 1, ctas_per_sm=4)),
    ),
    "bottleneck": (
        # bits, M, K, N, widest bottleneck
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 64, 64, 64, 4, 3)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(64, 32, 32, 128, 8, 3)),
        (16, 8192, 4096, 4096, 256, LaunchConfig(32, 32, 32, 256, 8, 3)),
        (16, 512, 4096, 4096, 64, LaunchConfig(16, 64, 64, 64, 4, 4)),
        (16, 512, 4096, 4096, 128, LaunchConfig(16, 64, 64, 128, 4, 3)),
        (16, 512, 4096, 4096, 256, LaunchConfig(16, 32, 32, 256, 4, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(32, 64, 32, 64, 4, 3)),
        (32, 512, 4096, 4096, 64, LaunchConfig(16, 64, 32, 64, 4, 3)),
        (32, 8192, 4096, 4096, 128, LaunchConfig(16, 32, 32, 128, 4, 3)),
    ),
    "bottleneck_backward": (
        # of its launch over columns: bits, M, K, N, widest bottleneck
        (16, 8192, 4096, 4096, 32, LaunchConfig(64, 16, 64, 32, 8, 3)),
        (16, 8192, 4096, 4096, 64, LaunchConfig(64, 16, 128, 64, 8, 3)),
        (16, 8192, 4096, 4096, 128, LaunchConfig(32, 16, 64, 128, 8, 3)),
        (32, 8192, 4096, 4096, 32, LaunchConfig(32, 16, 64, 32, 8, 3)),
        (32, 8192, 4096, 4096, 64, LaunchConfig(16, 16, 64, 64, 8, 3)),
    ),
}  # fmt: skip
