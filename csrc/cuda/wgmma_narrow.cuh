// wgmma of 16, 32 or 64 columns of bfloat16: sums along a large matrix, or down it, against a factor of few ranks.
//
// The narrow factor [k, ranks] lies with its rows across k, 32, 64 or 128 bytes each, with a swizzle of as many: chunk c of
// row i is at kBytes·i + 16·(c ^ swizzle_of<kBytes>(i)). Sums are those of wgmma.cuh.
#pragma once

#include <cstdint>

namespace lorafast::cuda::ptx {

// What the chunks of a row are exchanged by: bits 4 to 6 of an address by bits 7 to 9, of narrower rows fewer of them.
template <int kBytes>
__device__ __forceinline__ int swizzle_of(int row) {
  return row * kBytes / 128 & (kBytes / 16 - 1);
}

// Matrix Descriptor Format, of such a factor at a multiple of 1,024 bytes. The next 16 rows are kBytes further.
template <int kBytes>
__device__ __forceinline__ uint64_t describe_narrow(uint32_t address) {
  static_assert(kBytes == 32 || kBytes == 64 || kBytes == 128, "the swizzles that there are");
  constexpr uint64_t kSwizzle = uint64_t{kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kBytes / 16} << 32;
  return kSwizzle | kEightRows | uint64_t{1} << 16 | (address & 0x3FFFF) / 16;
}

#define LORAFAST_SUMS_8(i)                                                                          \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), \
      "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define LORAFAST_SUMS_16(i) LORAFAST_SUMS_8(i), LORAFAST_SUMS_8(i + 2)
#define LORAFAST_SUMS_32(i) LORAFAST_SUMS_16(i), LORAFAST_SUMS_16(i + 4)
#define LORAFAST_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORAFAST_NAMES_16 LORAFAST_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LORAFAST_NAMES_32 \
  LORAFAST_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define LORAFAST_MULTIPLY(columns, count, a_at, b_at, adds_at, down_at)                                         \
  template <int kDown>                                                                                          \
  __device__ __forceinline__ void multiply_narrow(float (&d)[count / 4][4], uint64_t a, uint64_t b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #adds_at                                            \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" LORAFAST_NAMES_##count      \
                 "}, %" #a_at ", %" #b_at ", adds, 1, 1, %" #down_at ", 1;\n}"                                  \
                 : LORAFAST_SUMS_##count(0)                                                                     \
                 : "l"(a), "l"(b), "r"(adds), "n"(kDown));                                                      \
  }

// d [64, n] = a·b, plus d where `adds`: b [16, n] is narrow, a [64, 16] lies along k, or with kDown across it.
LORAFAST_MULTIPLY(16, 8, 8, 9, 10, 11)
LORAFAST_MULTIPLY(32, 16, 16, 17, 18, 19)
LORAFAST_MULTIPLY(64, 32, 32, 33, 34, 35)

#undef LORAFAST_MULTIPLY
#undef LORAFAST_NAMES_32
#undef LORAFAST_NAMES_16
#undef LORAFAST_NAMES_8
#undef LORAFAST_SUMS_32
#undef LORAFAST_SUMS_16
#undef LORAFAST_SUMS_8

}  // namespace lorafast::cuda::ptx
