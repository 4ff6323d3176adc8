// The two-slope activation and its gradient on dense memory. kernels.py has the formulas, native.py builds and calls this.
//
// Written with the vectors that GCC and Clang share, a processor's own instructions are the compiler's affair: left to
// itself it turns bfloat16's rounding inside a sum into code three times as slow.
// float and double are computed in themselves, bfloat16 in float; a block's sum is, and blocks are added in double.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 4096;  // elements
constexpr int kLanes = 16;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
struct Plain {  // stored as it is computed
  using Stored = T;
  using Wide = T;
  static Vector<T> read(const T* p) {
    Vector<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void write(T* p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }
};

struct BFloat16 {  // the upper half of a float
  using Stored = uint16_t;
  using Wide = float;
  using Bits = Vector<uint32_t>;
  static Vector<float> read(const uint16_t* p) {
    return (Vector<float>)(__builtin_convertvector(Plain<uint16_t>::read(p), Bits) << 16);
  }
  // To the nearest, ties to even. NaN stays NaN without being asked for: here it comes from a bfloat16 or from `all`, so
  // its lower half is 0 and what rounding adds can't carry into the exponent.
  static void write(uint16_t* p, Vector<float> v) {
    const Bits bits = (Bits)v, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    Plain<uint16_t>::write(p, __builtin_convertvector(rounded, Vector<uint16_t>));
  }
};

template <class Kind>
struct Kernels {
  using T = typename Kind::Stored;
  using W = typename Kind::Wide;
  using V = Vector<W>;

  static V all(double value) { return V{} + W(value == value ? value : __builtin_nan("")); }

  static void forward_lanes(const T* x, T* y, V a, V b) {
    const V v = Kind::read(x);
    Kind::write(y, v * (v > 0 ? a : b));
  }
  static V backward_lanes(const T* g, const T* s, T* dx, V a, V b, V up, V down) {
    const V v = Kind::read(s), d = Kind::read(g);
    Kind::write(dx, d * (v > 0 ? a : b));
    return d * v * (v > 0 ? up : down);
  }

  static void forward_block(const T* x, T* y, int64_t n, const double* k) {
    const V a = all(k[0]), b = all(k[1]);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) forward_lanes(x + i, y + i, a, b);
    if (i < n) {  // fewer than a vector: padded with zeros
      T from[kLanes] = {}, to[kLanes];
      std::memcpy(from, x + i, (n - i) * sizeof(T));
      forward_lanes(from, to, a, b);
      std::memcpy(y + i, to, (n - i) * sizeof(T));
    }
  }
  static double backward_block(const T* g, const T* s, T* dx, int64_t n, const double* k) {
    const V a = all(k[0]), b = all(k[1]), up = all(k[2]), down = all(k[3]);
    V even{}, odd{};  // two sums, so that an addition needn't wait for the one before it
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      even += backward_lanes(g + i, s + i, dx + i, a, b, up, down);
      odd += backward_lanes(g + i + kLanes, s + i + kLanes, dx + i + kLanes, a, b, up, down);
    }
    for (; i < n; i += kLanes) {
      const size_t bytes = (n - i < kLanes ? n - i : kLanes) * sizeof(T);
      T gs[kLanes] = {}, ss[kLanes] = {}, to[kLanes];
      std::memcpy(gs, g + i, bytes);
      std::memcpy(ss, s + i, bytes);
      even += backward_lanes(gs, ss, to, a, b, up, down);
      std::memcpy(dx + i, to, bytes);
    }
    even += odd;
    W total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += even[lane];
    return total;
  }

  static int64_t left(int64_t n, int64_t i) { return n - i < kBlock ? n - i : kBlock; }

  static void forward(const T* x, T* y, int64_t n, const double* k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += kBlock) forward_block(x + i, y + i, left(n, i), k);
  }
  static double backward(const T* g, const T* s, T* dx, int64_t n, const double* k, int threads) {
    double total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
    for (int64_t i = 0; i < n; i += kBlock) total += backward_block(g + i, s + i, dx + i, left(n, i), k);
    return total;
  }
};

}  // namespace

#define LINL_KERNELS(NAME, KIND)                                                                                    \
  extern "C" void forward_##NAME(const void* x, void* y, int64_t n, const double* k, int threads) {                \
    using K = Kernels<KIND>;                                                                                       \
    K::forward((const K::T*)x, (K::T*)y, n, k, threads);                                                           \
  }                                                                                                                \
  extern "C" double backward_##NAME(const void* g, const void* s, void* dx, int64_t n, const double* k, int threads) { \
    using K = Kernels<KIND>;                                                                                       \
    return K::backward((const K::T*)g, (const K::T*)s, (K::T*)dx, n, k, threads);                                  \
  }

LINL_KERNELS(float32, Plain<float>)
LINL_KERNELS(float64, Plain<double>)
LINL_KERNELS(bfloat16, BFloat16)
