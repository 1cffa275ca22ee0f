// Part of microkernels_impl.h: the functions between a bottleneck adapter's products, and their derivatives.
//
// exp, tanh, and erf up to 1 as in Cephes (Moshier); erf beyond by 7.1.26 of Abramowitz and Stegun, off by 1.5e-7 at
// most.

typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

inline __attribute__((always_inline)) Vector all(float value) { return Vector{} + value; }

inline __attribute__((always_inline)) Vector choose(Ints mask, const Vector& yes, const Vector& no) {
  return (Vector)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

inline __attribute__((always_inline)) Vector magnitude(const Vector& x) { return (Vector)((Ints)x & 0x7FFFFFFF); }

inline __attribute__((always_inline)) Vector with_sign_of(const Vector& x, const Vector& sign) {
  return (Vector)((Ints)x | ((Ints)sign & static_cast<int32_t>(0x80000000)));
}

// Infinite beyond 88.7, 0 below -104; NaN stays.
inline __attribute__((always_inline)) Vector exp_of(Vector x) {
  x = choose((Ints)(x > 89.0f), all(89.0f), x);
  x = choose((Ints)(x < -104.0f), all(-104.0f), x);
  const Vector shifted = x * 1.44269504088896341f + 12582912.0f;  // a float whose last bits are the integer
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (Ints)shifted - 0x4B400000, half = power >> 1;  // in two steps: the range is wider than one's
  return p * (Vector)((half + 127) << 23) * (Vector)((power - half + 127) << 23);
}

inline __attribute__((always_inline)) Vector sigmoid_of(const Vector& x) { return 1.0f / (1.0f + exp_of(-x)); }

inline __attribute__((always_inline)) Vector tanh_of(const Vector& x) {
  const Vector size = magnitude(x), square = x * x;
  Vector p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vector small = p * square * x + x;
  const Vector large = with_sign_of(1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f), x);
  return choose((Ints)(size < 0.625f), small, large);
}

// The normal distribution's function at x, and its density.
inline __attribute__((always_inline)) void normal(const Vector& x, Vector& function, Vector& density) {
  const Vector gauss = exp_of(-0.5f * x * x);
  const Vector scaled = x * 0.70710678118654752f, size = magnitude(scaled), square = scaled * scaled;
  Vector q = square * 7.853861353153693e-5f - 8.010193625184903e-4f;
  q = q * square + 5.188327685732524e-3f;
  q = q * square - 2.685381193529856e-2f;
  q = q * square + 1.128358514861418e-1f;
  q = q * square - 3.761262582423300e-1f;
  q = (q * square + 1.128379165726710f) * scaled;
  const Vector t = 1.0f / (size * 0.3275911f + 1.0f);
  Vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  function = 0.5f * (1.0f + choose((Ints)(size < 1.0f), q, with_sign_of(1.0f - p * t * gauss, x)));
  density = gauss * 0.398942280401432678f;
}

// The tanh of GELU's approximation by it.
inline __attribute__((always_inline)) Vector gelu_tanh_of(const Vector& a) {
  return tanh_of(0.797884560802865356f * (a + 0.044715f * a * a * a));
}

void activate(Activation activation, int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector a = *reinterpret_cast<const Vector*>(from + i);
    Vector z = a, density;
    switch (activation) {
      case Activation::kGelu:
        normal(a, z, density);
        z *= a;
        break;
      case Activation::kGeluTanh: z = 0.5f * a * (1.0f + gelu_tanh_of(a)); break;
      case Activation::kRelu: z = choose((Ints)(a <= 0.0f), Vector{}, a); break;
      case Activation::kSilu: z = a / (1.0f + exp_of(-a)); break;
      case Activation::kTanh: z = tanh_of(a); break;
    }
    *reinterpret_cast<Vector*>(to + i) = z;
  }
}

void activate_backward(Activation activation, int64_t count, const float* from, float* gradient) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector a = *reinterpret_cast<const Vector*>(from + i);
    Vector& to = *reinterpret_cast<Vector*>(gradient + i);
    switch (activation) {
      case Activation::kGelu: {
        Vector function, density;
        normal(a, function, density);
        to *= function + a * density;
        break;
      }
      case Activation::kGeluTanh: {
        const Vector t = gelu_tanh_of(a);
        const Vector inner = 0.797884560802865356f * (1.0f + 3.0f * 0.044715f * a * a);
        to *= 0.5f * (1.0f + t) + 0.5f * a * (1.0f - t * t) * inner;
        break;
      }
      case Activation::kRelu: to = choose((Ints)(a <= 0.0f), Vector{}, to); break;
      case Activation::kSilu: {
        const Vector gate = sigmoid_of(a);
        to *= gate * (1.0f + a * (1.0f - gate));
        break;
      }
      case Activation::kTanh: {
        const Vector t = tanh_of(a);
        to *= 1.0f - t * t;
        break;
      }
    }
  }
}
