// A product by warp-specialised wgmma: the producer fills a ring of tiles by TMA, a warpgroup multiplies them.
#include <cuda_bf16.h>

#include "async.cuh"

using bf16 = __nv_bfloat16;

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kTile = 64;    // rows and columns of C, and the depth of a step: rows of 128 bytes
constexpr int kStages = 3;
constexpr int kDepth = 16;  // of one wgmma

struct Shared {
  alignas(1024) bf16 a[kStages][kTile * kTile];
  alignas(1024) bf16 b[kStages][kTile * kTile];
  alignas(1024) bf16 c[kTile * kTile];
  Barrier full[kStages];
  Barrier empty[kStages];
};

// A tile of 128-byte rows under the 128-byte swizzle, aligned to 1,024 bytes: its start, the distance of groups of
// eight rows, and the swizzle, all but the last in units of 16 bytes. A single panel of 64 elements has no distance
// to a next one; the field is one.
__device__ unsigned long long descriptor(const void* tile) {
  constexpr unsigned long long kSwizzle128 = 1;
  const auto start = static_cast<unsigned long long>((shared_address(tile) & 0x3ffff) >> 4);
  return start | 1ull << 16 | (1024ull >> 4) << 32 | kSwizzle128 << 62;
}

// Where chunk c of 16 bytes of a tile's row lies under that swizzle.
__device__ int swizzled(int row, int chunk) { return row * kTile + (chunk ^ (row & 7)) * 8; }

__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from using sums before the wait that this stands behind.
__device__ void settle(float (&c)[32]) {
#pragma unroll
  for (float& sum : c) asm volatile("" : "+f"(sum)::"memory");
}

// c [64, 64] = a [64, 16] · bᵀ, b [64, 16], added to c unless it is the first product.
__device__ void wgmma(float (&c)[32], unsigned long long a, unsigned long long b, bool add) {
  asm volatile(
      "{\n\t"
      ".reg .pred add;\n\t"
      "setp.ne.b32 add, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, add, 1, 1, 0, 0;\n\t"
      "}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same with a in registers and b [16, 64], whose rows are those of K.
__device__ void wgmma(float (&c)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
  asm volatile(
      "{\n\t"
      ".reg .pred add;\n\t"
      "setp.ne.b32 add, %37, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n\t"
      "}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// A step's products. kRegisters: max(a, 0) instead of a, which passes through registers; b is [K, N] then.
template <bool kRegisters>
__device__ void multiply(float (&c)[32], const bf16* a, const bf16* b, int step, int warp, int lane) {
  if constexpr (kRegisters) {
    unsigned fragments[kTile / kDepth][4];
#pragma unroll
    for (int k = 0; k < kTile / kDepth; ++k) {
      unsigned (&x)[4] = fragments[k];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(shared_address(&a[swizzled(warp * 16 + lane % 16, k * 2 + lane / 16)]))
                   : "memory");
#pragma unroll
      for (unsigned& pair : x) asm("max.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0));
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTile / kDepth; ++k)
      wgmma(c, fragments[k], descriptor(b + k * kDepth * kTile), step + k > 0);
  } else {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTile / kDepth; ++k) {
      // Along a row of the tile by 32 bytes: within the swizzle's eight rows the start may move so.
      constexpr int kAhead = kDepth * sizeof(bf16) / 16;
      wgmma(c, descriptor(a) + k * kAhead, descriptor(b) + k * kAhead, step + k > 0);
    }
  }
  wgmma_commit();
}

// C [M, N] = A · Bᵀ (or max(A, 0) · B, B [K, N]), bf16, sums in float. Every map has boxes of 64 × 64 under the
// 128-byte swizzle; K > 0. A block takes tiles of C in turn; its first warpgroup fills the ring, its second multiplies.
template <bool kRegisters>
__device__ void product(
    const TensorMap& A, const TensorMap& B, const TensorMap& C, int M, int N, int K, Shared& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full[stage], 1);
      barrier_init(shared.empty[stage], kGroup / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int across = (N + kTile - 1) / kTile, tiles = (M + kTile - 1) / kTile * across;
  const int steps = (K + kTile - 1) / kTile;
  Turn<kStages> turn;

  if (threadIdx.x < kGroup) {
    give_registers<40>();
    if (threadIdx.x / 32 != 0 || !elected()) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int row = tile / across * kTile, col = tile % across * kTile;
      for (int step = 0; step < steps; ++step, turn.next()) {
        Barrier& full = shared.full[turn.stage];
        wait(shared.empty[turn.stage], turn.emptied());
        arrive_expecting(full, sizeof(shared.a[0]) + sizeof(shared.b[0]));
        copy_box(shared.a[turn.stage], A, row, step * kTile, full);
        if (kRegisters) copy_box(shared.b[turn.stage], B, step * kTile, col, full);
        else copy_box(shared.b[turn.stage], B, col, step * kTile, full);
      }
    }
    return;
  }

  take_registers<232>();
  const int thread = threadIdx.x - kGroup, warp = thread / 32, lane = thread % 32;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float c[32];
    int before = -1;  // the stage whose products may still run
    for (int step = 0; step < steps; ++step, turn.next()) {
      wait(shared.full[turn.stage], turn.filled());
      multiply<kRegisters>(c, shared.a[turn.stage], shared.b[turn.stage], step, warp, lane);
      if (kRegisters) {
        wgmma_wait<0>();  // the fragments' registers are loaded anew
        __syncwarp();     // all lanes have read the tile that one of them releases
      } else {
        wgmma_wait<1>();
      }
      const int done = kRegisters ? turn.stage : before;
      if (done >= 0 && lane == 0) arrive(shared.empty[done]);
      before = turn.stage;
    }
    wgmma_wait<0>();
    settle(c);
    if (!kRegisters && lane == 0) arrive(shared.empty[before]);

    if (thread == 0) wait_stores_read<0>();  // the tile before has left
    meet(1, kGroup);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {  // two blocks of eight columns, each of two times eight rows
      __nv_bfloat162 pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(c[i * 8 + j * 2], c[i * 8 + j * 2 + 1]);
      const auto bits = reinterpret_cast<const unsigned (&)[4]>(pairs);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared_address(&shared.c[swizzled(warp * 16 + lane % 16, i * 2 + lane / 16)])),
                   "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
                   : "memory");
    }
    fence_async_proxy();
    meet(1, kGroup);
    if (thread == 0) {
      store_box(C, tile / across * kTile, tile % across * kTile, shared.c);
      commit_stores();
    }
  }
  if (thread == 0) wait_stores();
}

extern "C" __global__ void __launch_bounds__(2 * kGroup, 1) product_wgmma(
    const __grid_constant__ TensorMap A, const __grid_constant__ TensorMap B, const __grid_constant__ TensorMap C,
    int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  product<false>(A, B, C, M, N, K, *reinterpret_cast<Shared*>(dynamic_shared));
}

extern "C" __global__ void __launch_bounds__(2 * kGroup, 1) product_wgmma_registers(
    const __grid_constant__ TensorMap A, const __grid_constant__ TensorMap B, const __grid_constant__ TensorMap C,
    int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  product<true>(A, B, C, M, N, K, *reinterpret_cast<Shared*>(dynamic_shared));
}
