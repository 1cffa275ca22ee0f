// Arithmetic in half precision and below, an operation a row of `out`: test_cuda_halves.py has each row's
// definition, in this order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "rows.cuh"

using bf16 = __nv_bfloat16;

// A pair to a row for each.
template <typename Put, typename Pair>
__device__ void put_pair(Put& put, Pair pair) {
  put(pair.x);
  put(pair.y);
}

// out [rows, n] of x, y, z [n]; pairs are (x, y), (y, z) and (z, x).
extern "C" __global__ void halves(const __half* x, const __half* y, const __half* z, __half* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<__half> put(out, n, i);
  const __half a = x[i], b = y[i], c = z[i];
  const __half2 p = __halves2half2(a, b), q = __halves2half2(b, c), r = __halves2half2(c, a);
  put(__hadd(a, b));
  put(__hsub(a, b));
  put(__hmul(a, b));
  put(__hfma(a, b, c));
  put(__hadd_sat(a, b));
  put(__hfma_sat(a, b, c));
  put(__hneg(a));
  put(__habs(a));
  put(__hdiv(a, b));
  put(hsqrt(__habs(a)));
  put(hfloor(a));
  put(hrint(a));
  put(__hlt(a, b) ? a : c);
  put(__hisnan(a) ? b : c);
  put_pair(put, __hadd2(p, q));
  put_pair(put, __hmul2(p, q));
  put_pair(put, __hfma2(p, q, r));
  put_pair(put, __hfma2_sat(p, q, r));
  put_pair(put, __hneg2(p));
  put_pair(put, __hlt2(p, q));
  put_pair(put, __hgtu2(p, q));
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
  put(__hmin(a, b));
  put(__hmax_nan(a, b));
  put(__hfma_relu(a, b, c));
  put_pair(put, __hmax2(p, q));
  put_pair(put, __hmin2_nan(p, q));
  put_pair(put, __hfma2_relu(p, q, r));
#endif
}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
extern "C" __global__ void bfloats(const bf16* x, const bf16* y, const bf16* z, bf16* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<bf16> put(out, n, i);
  const bf16 a = x[i], b = y[i], c = z[i];
  const __nv_bfloat162 p = __halves2bfloat162(a, b), q = __halves2bfloat162(b, c), r = __halves2bfloat162(c, a);
  put(__hadd(a, b));
  put(__hsub(a, b));
  put(__hmul(a, b));
  put(__hfma(a, b, c));
  put(__hadd_sat(a, b));
  put(__hneg(a));
  put(__habs(a));
  put(__hdiv(a, b));
  put(hsqrt(__habs(a)));
  put(hceil(a));
  put(__hge(a, b) ? a : c);
  put(__hmin(a, b));
  put(__hmax_nan(a, b));
  put(__hfma_relu(a, b, c));
  put_pair(put, __hadd2(p, q));
  put_pair(put, __hmul2(p, q));
  put_pair(put, __hfma2(p, q, r));
  put_pair(put, __hmax2(p, q));
  put_pair(put, __hmin2_nan(p, q));
  put_pair(put, __hne2(p, q));
}
#endif

// From float and back, in every rounding that there is. Bits, since fp8 has no type of 16.
extern "C" __global__ void roundings(const float* x, const float* y, unsigned short* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<unsigned short> put(out, n, i);
  const float a = x[i], b = y[i];
  put(__half_as_ushort(__float2half_rn(a)));
  put(__half_as_ushort(__float2half_rz(a)));
  put(__half_as_ushort(__float2half_rd(a)));
  put(__half_as_ushort(__float2half_ru(a)));
  put_pair(
      put, make_ushort2(
               __half_as_ushort(__low2half(__floats2half2_rn(a, b))),
               __half_as_ushort(__high2half(__floats2half2_rn(a, b)))));
  put(__half_as_ushort(__double2half(static_cast<double>(a) * 1.0000001)));
  put(__bfloat16_as_ushort(__float2bfloat16_rn(a)));
  put(__bfloat16_as_ushort(__float2bfloat16_rz(a)));
  put(__bfloat16_as_ushort(__float2bfloat16_rd(a)));
  put(__bfloat16_as_ushort(__float2bfloat16_ru(a)));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  put_pair(put, make_ushort2(__bfloat16_as_ushort(pair.x), __bfloat16_as_ushort(pair.y)));
  put(__half_as_ushort(__int2half_rn(static_cast<int>(a * 100))));
  put(__half2ushort_rz(__float2half_rn(fabsf(a))));
  put(__half2short_rn(__float2half_rn(b)));
  put(__nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3));
  put(__nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E5M2));
}

// Every fp8 number, in both formats, to half precision. n = 256.
extern "C" __global__ void from_fp8(__half* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<__half> put(out, n, i);
  const auto pair = static_cast<__nv_fp8x2_storage_t>(i | (255 - i) << 8);
  const __half2 e4m3 = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  const __half2 e5m2 = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E5M2);
  put_pair(put, e4m3);
  put_pair(put, e5m2);
}

// What has an error.
extern "C" __global__ void halves_near(const __half* x, __half* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<__half> put(out, n, i);
  const __half a = x[i];
  put(hexp(a));
  put(hexp2(a));
  put(hlog2(__habs(a)));
  put(hrsqrt(__habs(a)));
  put(hsin(a));
  put(htanh(a));
}
