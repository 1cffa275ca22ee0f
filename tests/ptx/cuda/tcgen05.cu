// A product on the tensor cores of sm_100, whose accumulators lie in tensor memory.
#include <cuda_bf16.h>

#include "async.cuh"

using bf16 = __nv_bfloat16;

constexpr int kRows = 128;  // of C a block: one for each lane of tensor memory
constexpr int kCols = 64;   // of C a block: columns of tensor memory
constexpr int kStep = 64;   // of K a step: rows of 128 bytes
constexpr int kDepth = 16;  // of one mma
constexpr int kStages = 3;
constexpr int kPiece = 32;  // columns that a thread loads at a time

struct Shared {
  alignas(1024) bf16 a[kStages][kRows * kStep];
  alignas(1024) bf16 b[kStages][kCols * kStep];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier done;  // every product has been added
  unsigned accumulator;
};

// A tile of 128-byte rows under the 128-byte swizzle: its start and the distance of groups of eight rows, in units of
// 16 bytes; 1 for the distance that such a tile doesn't have, and for the version.
__device__ unsigned long long descriptor(const void* tile) {
  constexpr unsigned long long kVersion = 1, kSwizzle128 = 2;
  const auto start = static_cast<unsigned long long>((shared_address(tile) & 0x3ffff) >> 4);
  return start | 1ull << 16 | (1024ull >> 4) << 32 | kVersion << 46 | kSwizzle128 << 61;
}

// What the products are: float sums of bf16, both operands with K inside, and the shape.
constexpr unsigned kInstruction = 1u << 4 | 1u << 7 | 1u << 10 | (kCols / 8) << 17 | (kRows / 16) << 24;

// Columns of tensor memory, whose address is written to shared memory. By all lanes of a warp, which frees it too.
__device__ void allocate(unsigned& address, unsigned columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared_address(&address)),
               "r"(columns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

__device__ void release(unsigned address, unsigned columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns));
}

// c [128, 64] = a [128, 16] · bᵀ, b [64, 16], added to c if `add`. By one thread.
__device__ void mma(unsigned c, unsigned long long a, unsigned long long b, bool add) {
  asm volatile(
      "{\n\t"
      ".reg .pred add;\n\t"
      "setp.ne.b32 add, %4, 0;\n\t"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, add;\n\t"
      "}" ::"r"(c),
      "l"(a), "l"(b), "r"(kInstruction), "r"(static_cast<int>(add))
      : "memory");
}

// The barrier is arrived at when all mma's so far of this thread are complete.
__device__ void commit(Barrier& barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}

// Between tensor memory's operations of several threads that a barrier orders.
__device__ void fence_before_barrier() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ void fence_after_barrier() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// 32 columns of this thread's lane; a warp reaches the 32 lanes of its place among four. With the wait in one
// statement, between whose instructions the compiler can't use what isn't there yet.
__device__ void load(float (&x)[kPiece], unsigned address) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];\n\t"
      "tcgen05.wait::ld.sync.aligned;"
      : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]), "=f"(x[4]), "=f"(x[5]), "=f"(x[6]), "=f"(x[7]), "=f"(x[8]),
        "=f"(x[9]), "=f"(x[10]), "=f"(x[11]), "=f"(x[12]), "=f"(x[13]), "=f"(x[14]), "=f"(x[15]), "=f"(x[16]),
        "=f"(x[17]), "=f"(x[18]), "=f"(x[19]), "=f"(x[20]), "=f"(x[21]), "=f"(x[22]), "=f"(x[23]), "=f"(x[24]),
        "=f"(x[25]), "=f"(x[26]), "=f"(x[27]), "=f"(x[28]), "=f"(x[29]), "=f"(x[30]), "=f"(x[31])
      : "r"(address)
      : "memory");
}

__device__ void store(unsigned address, const float (&x)[kPiece]) {
  asm volatile(
      "tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31};" ::"f"(x[0]),
      "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]), "f"(x[8]), "f"(x[9]),
      "f"(x[10]), "f"(x[11]), "f"(x[12]), "f"(x[13]), "f"(x[14]), "f"(x[15]), "f"(x[16]), "f"(x[17]), "f"(x[18]),
      "f"(x[19]), "f"(x[20]), "f"(x[21]), "f"(x[22]), "f"(x[23]), "f"(x[24]), "f"(x[25]), "f"(x[26]), "f"(x[27]),
      "f"(x[28]), "f"(x[29]), "f"(x[30]), "f"(x[31]), "r"(address)
      : "memory");
  asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
}

// C [M, N] = A [M, K] · Bᵀ + bias, B [N, K], bf16 to float; without a bias if it is null. A's map has boxes of
// 128 × 64, B's of 64 × 64, both under the 128-byte swizzle; K > 0. A block of four warps a tile of C: warp 0 fills
// the ring, warp 1 multiplies, each with one lane; all four bring the bias in and the sums out.
extern "C" __global__ void __launch_bounds__(128) product_tcgen05(
    const __grid_constant__ TensorMap A, const __grid_constant__ TensorMap B, const float* bias, float* C, int M,
    int N, int K) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int row = blockIdx.y * kRows, col = blockIdx.x * kCols, warp = threadIdx.x / 32;
  if (warp == 0) allocate(shared.accumulator, kCols);
  if (threadIdx.x == 32) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full[stage], 1);
      barrier_init(shared.empty[stage], 1);
    }
    barrier_init(shared.done, 1);
    fence_barrier_init();
  }
  fence_before_barrier();
  __syncthreads();
  fence_after_barrier();
  const unsigned accumulator = shared.accumulator;
  const unsigned own_lanes = accumulator + (warp * 32 << 16);  // lanes in the upper half of an address
  if (bias) {
    for (int piece = 0; piece < kCols; piece += kPiece) {
      float x[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = col + piece + i < N ? bias[col + piece + i] : 0.0f;
      store(own_lanes + piece, x);
    }
    fence_before_barrier();
    __syncthreads();
    fence_after_barrier();
  }

  const int steps = (K + kStep - 1) / kStep;
  if (warp == 0 && elected()) {
    Turn<kStages> turn;
    for (int step = 0; step < steps; ++step, turn.next()) {
      Barrier& full = shared.full[turn.stage];
      wait(shared.empty[turn.stage], turn.emptied());
      arrive_expecting(full, sizeof(shared.a[0]) + sizeof(shared.b[0]));
      copy_box(shared.a[turn.stage], A, row, step * kStep, full);
      copy_box(shared.b[turn.stage], B, col, step * kStep, full);
    }
  } else if (warp == 1 && elected()) {
    Turn<kStages> turn;
    for (int step = 0; step < steps; ++step, turn.next()) {
      wait(shared.full[turn.stage], turn.filled());
      fence_after_barrier();
      for (int k = 0; k < kStep / kDepth; ++k) {
        const int ahead = k * kDepth * sizeof(bf16) / 16;
        mma(accumulator, descriptor(shared.a[turn.stage]) + ahead, descriptor(shared.b[turn.stage]) + ahead,
            bias != nullptr || step + k > 0);
      }
      if (step + kStages < steps) commit(shared.empty[turn.stage]);  // else nobody fills it again
    }
    commit(shared.done);
  }
  __syncwarp();
  wait(shared.done, 0);
  fence_after_barrier();

  const int m = row + threadIdx.x;
  for (int piece = 0; piece < kCols; piece += kPiece) {
    float x[kPiece];
    load(x, own_lanes + piece);
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      if (m < M && col + piece + i < N) C[static_cast<size_t>(m) * N + col + piece + i] = x[i];
  }
  fence_before_barrier();
  __syncthreads();
  if (warp == 0) {
    fence_after_barrier();
    release(accumulator, kCols);
  }
}
