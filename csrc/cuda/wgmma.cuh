// wgmma: a warpgroup's matrix products, both factors in shared memory. sm_90a alone has them.
//
// Factors lie as TMA leaves them with a swizzle of 128 bytes, at multiples of 1,024 bytes: chunk c of 16 bytes of row i
// is at 128·i + 16·(c ^ i % 8). A multiplication takes 32 bytes along k.
//
// The sums d [64, n] of a thread: with warp w of the warpgroup, g = lane / 4 and t = lane % 4, d[j][2·h + e] is row
// 16·w + g + 8·h, column 8·j + 2·t + e: a slab of gemm_epilogue.cuh.
#pragma once

#include <cstdint>

#include "numbers.cuh"

namespace lorafast::cuda::ptx {

// Matrix Descriptor Format. Of a factor whose rows lie along k, 128 bytes of it, eight rows to 1,024 bytes; the next
// 32 bytes along k are 2 further.
__device__ __forceinline__ uint64_t describe_rows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (address & 0x3FFFF) / 16;
}

// Of a factor whose rows of 128 bytes lie across k: blocks of 64 columns, each with the kRows rows along k. The next
// 16 rows are 128 further.
template <int kRows>
__device__ __forceinline__ uint64_t describe_columns(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{kRows * 128 / 16} << 16 | (address & 0x3FFFF) / 16;
}

// wgmma.fence: before the first product, and after registers of the sums were used otherwise.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// All groups but the last `left` are done.
template <int left>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(left) : "memory");
}

// The compiler doesn't know that products are asynchronous: nothing that uses the sums passes this.
template <int kTiles>
__device__ __forceinline__ void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]) : : "memory");
  }
}

#define LORAFAST_SUMS_8(i)                                                                          \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), \
      "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define LORAFAST_SUMS_32(i) \
  LORAFAST_SUMS_8(i), LORAFAST_SUMS_8(i + 2), LORAFAST_SUMS_8(i + 4), LORAFAST_SUMS_8(i + 6)
#define LORAFAST_SUMS_64(i) LORAFAST_SUMS_32(i), LORAFAST_SUMS_32(i + 8)
#define LORAFAST_SUMS_128(i) LORAFAST_SUMS_64(i), LORAFAST_SUMS_64(i + 16)

#define LORAFAST_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORAFAST_NAMES_32                                                                                     \
  LORAFAST_NAMES_8                                                                                            \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define LORAFAST_NAMES_64                                                                                       \
  LORAFAST_NAMES_32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LORAFAST_NAMES_128                                                                                      \
  LORAFAST_NAMES_64                                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "   \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "      \
  "%122, %123, %124, %125, %126, %127"

// wgmma.mma_async of 16 bits: d = a·b, plus d where `adds`. a [64, 16] lies along k; b across k where kAcross.
#define LORAFAST_WGMMA_16(columns, count, a_at, b_at, adds_at, across_at, type)                                  \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #adds_at                                               \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" LORAFAST_NAMES_##count \
               "}, %" #a_at ", %" #b_at ", adds, 1, 1, 0, %" #across_at ";\n}"                                   \
               : LORAFAST_SUMS_##count(0)                                                                        \
               : "l"(a), "l"(b), "r"(adds), "n"(kAcross))

// The same of TF32: a [64, 8] and b [8, n], both along k.
#define LORAFAST_WGMMA_TF32(columns, count, a_at, b_at, adds_at)                                        \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #adds_at                                      \
               ", 0;\n"                                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k8.f32.tf32.tf32 {" LORAFAST_NAMES_##count \
               "}, %" #a_at ", %" #b_at ", adds, 1, 1;\n}"                                              \
               : LORAFAST_SUMS_##count(0)                                                               \
               : "l"(a), "l"(b), "r"(adds))

#define LORAFAST_MULTIPLY(columns, count, a_at, b_at, adds_at, across_at)                                    \
  template <class T, int kAcross>                                                                            \
  __device__ __forceinline__ void multiply_add(float (&d)[count / 4][4], uint64_t a, uint64_t b, int adds) { \
    if constexpr (DtypeOf<T>::value == Dtype::bfloat16) {                                                    \
      LORAFAST_WGMMA_16(columns, count, a_at, b_at, adds_at, across_at, "bf16");                             \
    } else if constexpr (DtypeOf<T>::value == Dtype::float16) {                                              \
      LORAFAST_WGMMA_16(columns, count, a_at, b_at, adds_at, across_at, "f16");                              \
    } else {                                                                                                 \
      static_assert(kAcross == 0, "TF32 lies along k");                                                      \
      LORAFAST_WGMMA_TF32(columns, count, a_at, b_at, adds_at);                                              \
    }                                                                                                        \
  }

// d [64, n] of so many registers a thread: n is twice that. T: bfloat16, float16, or float for TF32.
LORAFAST_MULTIPLY(256, 128, 128, 129, 130, 131)
LORAFAST_MULTIPLY(128, 64, 64, 65, 66, 67)
LORAFAST_MULTIPLY(64, 32, 32, 33, 34, 35)
LORAFAST_MULTIPLY(16, 8, 8, 9, 10, 11)

#undef LORAFAST_MULTIPLY
#undef LORAFAST_WGMMA_TF32
#undef LORAFAST_WGMMA_16
#undef LORAFAST_NAMES_128
#undef LORAFAST_NAMES_64
#undef LORAFAST_NAMES_32
#undef LORAFAST_NAMES_8
#undef LORAFAST_SUMS_128
#undef LORAFAST_SUMS_64
#undef LORAFAST_SUMS_32
#undef LORAFAST_SUMS_8

}  // namespace lorafast::cuda::ptx
