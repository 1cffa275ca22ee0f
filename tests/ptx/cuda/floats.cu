// Floating-point arithmetic and conversions, an operation a row of `out`: test_cuda_floats.py has each row's
// definition, in this order.
#include <cuda_runtime.h>

#include "rows.cuh"

// What is rounded as IEEE 754 says, so that the bits are known.
extern "C" __global__ void floats(const float* x, const float* y, const float* z, float* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<float> put(out, n, i);
  const float a = x[i], b = y[i], c = z[i];
  put(a + b);
  put(a - b);
  put(__fmul_rn(a, b));
  put(a / b);
  put(sqrtf(fabsf(a)));
  put(fmaf(a, b, c));
  put(__fmaf_rz(a, b, c));
  put(__fmaf_rd(a, b, c));
  put(__fmaf_ru(a, b, c));
  put(__fadd_rz(a, b));
  put(__fadd_rd(a, b));
  put(__fadd_ru(a, b));
  put(__fmul_rz(a, b));
  put(__fmul_rd(a, b));
  put(__fmul_ru(a, b));
  put(__fdiv_rz(a, b));
  put(__fsqrt_rd(fabsf(a)));
  put(__frcp_rn(b));
  put(__frcp_ru(b));
  put(fminf(a, b));
  put(fmaxf(a, b));
  put(fabsf(a));
  put(-a);
  put(copysignf(a, b));
  put(floorf(a));
  put(ceilf(a));
  put(truncf(a));
  put(rintf(a));
  put(roundf(a));
  put(__saturatef(a));
  put(a < b ? a : c);
  put(isnan(a) ? 1 : isinf(a) ? 2 : 3);
  put(signbit(a) ? 1 : 0);
  put(__int_as_float(__float_as_int(a) + 1));
}

// What has an error: instructions (`.approx`), then the library's functions, whose slow paths branch.
extern "C" __global__ void floats_near(const float* x, const float* y, float* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<float> put(out, n, i);
  const float a = x[i], b = y[i];  // b > 0
  float r;
  put(__fdividef(a, b));
  put(rsqrtf(b));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  put(r);
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(b));
  put(r);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  put(r);
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(b));
  put(r);
  put(__sinf(a));
  put(__cosf(a));
  put(__expf(a));
  put(__logf(b));
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
  put(r);
  put(expf(a));
  put(exp2f(a));
  put(logf(b));
  put(sinf(a * 1e6f));  // beyond what a few multiples of π reduce
  put(cosf(a));
  put(tanhf(a));
  put(erff(a));
  put(powf(b, a));
  put(cbrtf(a));
  put(fmodf(a, b));
}

extern "C" __global__ void doubles(const double* x, const double* y, double* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<double> put(out, n, i);
  const double a = x[i], b = y[i];
  put(a + b);
  put(a - b);
  put(__dmul_rn(a, b));
  put(a / b);
  put(sqrt(fabs(a)));
  put(fma(a, b, a));
  put(__dadd_rz(a, b));
  put(__dmul_ru(a, b));
  put(fmin(a, b));
  put(fmax(a, b));
  put(fabs(a));
  put(copysign(a, b));
  put(floor(a));
  put(rint(a));
  put(trunc(a));
  put(static_cast<float>(a));
  put(__double2float_rd(a));
  put(static_cast<double>(static_cast<long long>(a)));
  put(static_cast<double>(static_cast<unsigned>(i) * 3000000000u));
  put(exp(a / 100));
  put(log(fabs(a)));
  put(a < b ? 1 : 0);
  put(__hiloint2double(__double2hiint(a), __double2loint(b)));
}

// Between floats and integers, whose range ends the conversion: NaN is 0 (of 64 bits, the smallest).
extern "C" __global__ void to_integers(const float* x, int* out, long long* wide, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<int> put(out, n, i);
  const float a = x[i];
  put(__float2int_rn(a));
  put(__float2int_rz(a));
  put(__float2int_rd(a));
  put(__float2int_ru(a));
  put(__float2uint_rn(a));
  put(__float2uint_rz(a));
  put(__float2uint_rd(a));
  put(__float2uint_ru(a));
  put(__double2int_rn(static_cast<double>(a) * 1.000000001));
  put(__double2uint_rz(a));
  int r;
  asm("{\n\t"
      ".reg .s8 narrow;\n\t"
      "cvt.rni.sat.s8.f32 narrow, %1;\n\t"
      "cvt.s32.s8 %0, narrow;\n\t"
      "}"
      : "=r"(r)
      : "f"(a));
  put(r);
  asm("{\n\t"
      ".reg .u16 narrow;\n\t"
      "cvt.rzi.sat.u16.f32 narrow, %1;\n\t"
      "cvt.u32.u16 %0, narrow;\n\t"
      "}"
      : "=r"(r)
      : "f"(a));
  put(r);
  Rows<long long> put_wide(wide, n, i);
  put_wide(__float2ll_rn(a));
  put_wide(__float2ll_rz(a));
  put_wide(__float2ll_rd(a));
  put_wide(__float2ull_ru(a));
}

extern "C" __global__ void from_integers(const long long* x, float* out, double* wide, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<float> put(out, n, i);
  const long long a = x[i];
  const int b = static_cast<int>(a);
  put(__int2float_rn(b));
  put(__int2float_rz(b));
  put(__int2float_rd(b));
  put(__int2float_ru(b));
  put(__uint2float_rn(b));
  put(__uint2float_rz(b));
  put(__uint2float_rd(b));
  put(__uint2float_ru(b));
  put(__ll2float_rn(a));
  put(__ll2float_rz(a));
  put(__ull2float_ru(a));
  put(static_cast<float>(static_cast<short>(b)));
  put(static_cast<float>(static_cast<unsigned char>(b)));
  put(static_cast<float>(static_cast<signed char>(b)));
  Rows<double> put_wide(wide, n, i);
  put_wide(b);
  put_wide(__ll2double_rn(a));
  put_wide(__ll2double_rd(a));
  put_wide(__ull2double_ru(a));
}

// Of numbers below the smallest normal one: kept, or zero with the sign (`.ftz`), before and after the operation.
extern "C" __global__ void small_floats(const float* x, const float* y, float* out, int n) {
  const int i = element();
  if (i >= n) return;
  Rows<float> put(out, n, i);
  const float a = x[i], b = y[i];
  float r;
  put(__fadd_rn(a, b));
  put(__fmul_rn(a, b));
  asm("add.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("fma.rn.ftz.f32 %0, %1, %2, %1;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("max.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("abs.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  put(r);
  asm("add.sat.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("fma.rn.sat.f32 %0, %1, %2, %2;" : "=f"(r) : "f"(a), "f"(b));
  put(r);
  asm("{\n\t"
      ".reg .pred p;\n\t"
      "setp.eq.ftz.f32 p, %1, %2;\n\t"
      "selp.f32 %0, 0f3F800000, 0f00000000, p;\n\t"
      "}"
      : "=f"(r)
      : "f"(a), "f"(b));
  put(r);
  asm("{\n\t"
      ".reg .pred p;\n\t"
      "setp.geu.f32 p, %1, %2;\n\t"
      "selp.f32 %0, 0f3F800000, 0f00000000, p;\n\t"
      "}"
      : "=f"(r)
      : "f"(a), "f"(b));
  put(r);
}
