// The PTX instructions that CUDA C++ has no name for, each wrapped once, with the layout of its fragments. The
// sections are those of NVIDIA's PTX ISA.
//
// Lanes of a warp in a fragment: g = lane / 4 is its group, t = lane % 4 its place there.
#pragma once

#include <cstdint>

namespace lorafast::cuda::ptx {

// Special registers: %globaltimer. Nanoseconds, of one clock for the whole device.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Where shared memory has no generic address: a pointer into it, in its own window.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same number, of which the compiler can't tell that it is: what is computed from it is computed again, where
// results of the last time would be kept in registers.
__device__ __forceinline__ int again(int x) {
  int same;
  asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(x));
  return same;
}

// The same of a pointer: it is kept in a register, where it would be computed again for each use.
template <class P>
__device__ __forceinline__ P* kept(P* x) {
  uint64_t same;
  asm volatile("mov.b64 %0, %1;" : "=l"(same) : "l"(x));
  return reinterpret_cast<P*>(same);
}

// threadIdx.x, asked for again where it would be kept in a register all the while.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Numbers

// Integer Arithmetic Instructions: mul.wide. Both words of a product, the low one first. Left to itself nvcc makes 64
// bits of all that follows.
__device__ __forceinline__ uint2 multiply_wide(uint32_t a, uint32_t b) {
  uint2 words;
  asm("{\n.reg .b64 whole;\nmul.wide.u32 whole, %2, %3;\nmov.b64 {%0, %1}, whole;\n}"
      : "=r"(words.x), "=r"(words.y)
      : "r"(a), "r"(b));
  return words;
}

// Data Movement: prmt. Four of the eight bytes of b:a, by a number each in a half-byte of `by`; with 8 more the highest
// bit of a byte, eight times.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t by) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(by));
  return bytes;
}

// Data Movement: cvt of two e4m3, the lower half of a word, to two float16, which have all of their numbers. From sm_89
// on.
__device__ __forceinline__ uint32_t to_halves(uint32_t two) {
  uint32_t halves;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}"
      : "=r"(halves)
      : "r"(two));
  return halves;
}

// Data Movement: cvt.rna.tf32.f32. The nearest number of TF32, of two the one that is further from 0. From sm_80 on.
__device__ __forceinline__ uint32_t nearest_tf32(float x) {
  uint32_t nearest;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(nearest) : "f"(x));
  return nearest;
}

// Loads

// Data Movement: ld. 16 bytes that are read once: they don't push others out of L1. Aligned to 16 bytes, never
// written by this launch.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// 16 bytes that others read too. Aligned to 16 bytes, never written by this launch.
__device__ __forceinline__ uint4 load_constant(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// prefetch: brings a line of memory to L2.
__device__ __forceinline__ void fetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from)); }

// Stores

// Data Movement: st. 16 bytes, aligned to that; what is written as four words in C++ may become four stores.
__device__ __forceinline__ void store_16(void* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// The same of 8 bytes.
__device__ __forceinline__ void store_8(void* to, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(v.x), "r"(v.y) : "memory");
}

// Asynchronous copies

// The first `bytes` of 16, an even number, then zeros: what copies do before sm_80.
__device__ __forceinline__ uint4 load_some(const void* from, int bytes) {
  if (bytes == 16) return load_constant(from);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (2 * i < bytes)
      words[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << (16 * (i % 2));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Data Movement: cp.async, from sm_80 on as all of this section. Copies the first `bytes` of 16 and zeros the rest.
// Nothing is read where `bytes` is 0. On sm_75 this and the next copy at once, through registers, what this launch
// doesn't write.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(to) = load_some(from, bytes);
#endif
}

// The same of all 16.
__device__ __forceinline__ void copy_whole_16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(to)), "l"(from) : "memory");
#else
  *static_cast<uint4*>(to) = load_constant(from);
#endif
}

// copy_16 to an address in the window of shared memory.
__device__ __forceinline__ void copy_16_to(uint32_t to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

// cp.async.commit_group: the copies since the last one become a group.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// cp.async.wait_group: this thread's groups are there, but for the last `left`. Others see them after a barrier.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(left) : "memory");
#endif
}

// Matrices

// Warp-Level Matrix Instructions: ldmatrix. Four matrices of 8 x 8 halves. Lane 8·i + j gives the address of row j
// of matrix i, 16 bytes. Register i of a lane has elements (g, 2t) and (g, 2t + 1) of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Each transposed: register i of a lane has elements (2t, g) and (2t + 1, g) of matrix i.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// A word, by an address in the window of shared memory.
__device__ __forceinline__ uint32_t load_word_at(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ __forceinline__ void store_word_at(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(word) : "memory");
}

// 16 bytes, by an address in the window of shared memory.
__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Four matrices, by addresses in the window of shared memory: as they are, and each transposed.
__device__ __forceinline__ void load_matrices_at(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed_at(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// mma.sync.m16n8k16: c += a·b in float32, of bfloat16.
//   a [16, 16]: register 0 has (g, 2t..), 1 (g + 8, 2t..), 2 (g, 2t + 8..), 3 (g + 8, 2t + 8..), a pair each;
//   b [16, 8]:  register 0 has (2t.., g), 1 (2t + 8.., g), a pair each;
//   c [16, 8]:  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.sync.m16n8k8: the same with half as many places along the sum.
//   a [16, 8]: register 0 has (g, 2t..), 1 (g + 8, 2t..), a pair each;  b [8, 8]: (2t.., g), a pair.
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// mma.sync.m16n8k16 of float16, as of bfloat16.
__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.sync.m16n8k8 of float16, all that sm_75 has.
__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// mma.sync.m16n8k8 of TF32: float32 of which the last 13 bits aren't read.
//   a [16, 8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b [8, 8]: (t, g), (t + 4, g);  c as above.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Memory order between CTAs

// Memory Consistency Model, and ld: what was stored before the matching release can be loaded after it.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// Parallel Synchronization: atom. Returns what was there.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ uint32_t add_relaxed(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

}  // namespace lorafast::cuda::ptx
