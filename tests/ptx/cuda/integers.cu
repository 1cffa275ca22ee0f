// Integer arithmetic, an operation a row of `out`: test_cuda_integers.py has each row's definition, in this order.
#include "rows.cuh"

// out [rows, n] of x, y [n]; y is not zero.
extern "C" __global__ void integers(const int* x, const int* y, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<int> put(out, n, i);
  const int a = x[i], b = y[i];
  const auto u = static_cast<unsigned>(a), v = static_cast<unsigned>(b);
  const unsigned few = v & 31;
  put(u + v);
  put(u - v);
  put(u * v);
  put(u * 37u + v);
  put(a == INT_MIN ? 0 : a / b);  // INT_MIN / -1 is not defined
  put(a == INT_MIN ? 0 : a % b);
  put(u / v);
  put(u % v);
  put(u / 7);
  put(a / 12);
  put(__mulhi(a, b));
  put(__umulhi(u, v));
  put(min(a, b));
  put(max(a, b));
  put(min(u, v));
  put(max(u, v));
  put(abs(a / 2));
  put(u << few);
  put(a >> few);
  put(u >> few);
  put((a & b) | (~a & 0x0f0f0f0f));
  put(a ^ ~b);
  put(__popc(u));
  put(__clz(a));
  put(__ffs(a));
  put(__brev(u));
  put(__byte_perm(u, v, 0x3617));
  put(__byte_perm(u, v, u));
  put(__funnelshift_l(u, v, 9));
  put(__funnelshift_r(u, v, u));
  put(__funnelshift_lc(u, v, u & 63));
  put(__funnelshift_rc(u, v, u & 63));
  put(__dp4a(a, b, 1000));
  put(__dp4a(u, v, 1000u));
  put(__dp2a_lo(a, b, -7));
  put(__dp2a_hi(u, v, 7u));
  put(__sad(a, b, 3u));
  put(__usad(u, v, 3u));
  put(__hadd(a, b));
  put(__urhadd(u, v));
  put(a > b ? a - 3 : b * 5);
  put(static_cast<signed char>(a) * static_cast<unsigned char>(b));
  put(static_cast<short>(a) + static_cast<unsigned short>(b));
}

// The same, of instructions that C++ has no word for.
extern "C" __global__ void integers_ptx(const int* x, const int* y, int* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<int> put(out, n, i);
  const int a = x[i], b = y[i];
  int r;
  asm("bfe.s32 %0, %1, 5, 9;" : "=r"(r) : "r"(a));
  put(r);
  asm("bfe.u32 %0, %1, %2, 12;" : "=r"(r) : "r"(a), "r"(b & 31));
  put(r);
  asm("bfi.b32 %0, %1, %2, 8, 11;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("bfind.u32 %0, %1;" : "=r"(r) : "r"(a));
  put(r);
  asm("bfind.shiftamt.s32 %0, %1;" : "=r"(r) : "r"(a));
  put(r);
  asm("add.sat.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("sub.sat.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("mad.lo.s32 %0, %1, %2, %2;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("mad.hi.u32 %0, %1, %2, %1;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("mul24.lo.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("lop3.b32 %0, %1, %2, 0x12345678, 0xe8;" : "=r"(r) : "r"(a), "r"(b));  // the majority of three
  put(r);
  asm("szext.wrap.s32 %0, %1, 13;" : "=r"(r) : "r"(a));
  put(r);
  asm("slct.s32.s32 %0, %1, %2, %1;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  asm("cnot.b32 %0, %1;" : "=r"(r) : "r"(a & 1));
  put(r);
  asm("fns.b32 %0, %1, 3, 2;" : "=r"(r) : "r"(a));
  put(r);
  asm("{\n\t"
      ".reg .pred c, p, q;\n\t"
      "setp.ne.s32 c, %1, 0;\n\t"
      "setp.lt.and.s32 p|q, %1, %2, c;\n\t"
      "mov.b32 %0, 7;\n\t"
      "@p add.s32 %0, %1, 1;\n\t"
      "@q add.s32 %0, %2, 2;\n\t"
      "}"
      : "=&r"(r)
      : "r"(a), "r"(b));
  put(r);
  asm("set.gt.u32.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  put(r);
  // (a, b) as a number of 64 bits, three times itself: its upper half.
  asm("{\n\t"
      ".reg .u32 low, high;\n\t"
      "add.cc.u32 low, %1, %1;\n\t"
      "addc.u32 high, %2, %2;\n\t"
      "add.cc.u32 low, low, %1;\n\t"
      "addc.u32 %0, high, %2;\n\t"
      "}"
      : "=r"(r)
      : "r"(a), "r"(b));
  put(r);
  asm("{\n\t"
      ".reg .u32 low;\n\t"
      "sub.cc.u32 low, %1, %2;\n\t"
      "subc.u32 %0, %2, %1;\n\t"
      "}"
      : "=r"(r)
      : "r"(a), "r"(b));
  put(r);
}

using Wide = long long;
using Unsigned = unsigned long long;

extern "C" __global__ void integers_wide(const Wide* x, const Wide* y, Wide* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<Wide> put(out, n, i);
  const Wide a = x[i], b = y[i];
  const auto u = static_cast<Unsigned>(a), v = static_cast<Unsigned>(b);
  const unsigned few = v & 63;
  put(u + v);
  put(u - v);
  put(u * v);
  put(a == LLONG_MIN ? 0 : a / b);
  put(a == LLONG_MIN ? 0 : a % b);
  put(u / v);
  put(u % v);
  put(u / 1000003);
  put(__mul64hi(a, b));
  put(__umul64hi(u, v));
  put(min(a, b));
  put(max(u, v));
  put(u << few);
  put(a >> few);
  put(u >> few);
  put(a & ~b);
  put(a | b);
  put(a ^ b);
  put(__popcll(u));
  put(__clzll(a));
  put(__ffsll(a));
  put(__brevll(u));
  put(llabs(a / 2));
  put(static_cast<int>(a));
  put(static_cast<Wide>(static_cast<int>(a)) * static_cast<int>(b));
  put(static_cast<Unsigned>(static_cast<unsigned>(a)) * static_cast<unsigned>(b) + u);
  put(static_cast<short>(a));
  put(static_cast<unsigned char>(a));
  const auto square = static_cast<unsigned __int128>(u) * u + v;
  put(static_cast<Unsigned>(square >> 64));
  put(static_cast<Unsigned>(square / 3 >> 40));
}
