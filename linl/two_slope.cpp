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

// A kind reads and writes 2 · kLanes elements, as two vectors: which element is in which lane is its own affair.

template <class T>
struct Plain {  // stored as it is computed
  using Stored = T;
  using Wide = T;
  static void read(const T* p, Vector<T>& first, Vector<T>& second) {
    std::memcpy(&first, p, sizeof first);
    std::memcpy(&second, p + kLanes, sizeof second);
  }
  static void write(T* p, Vector<T> first, Vector<T> second) {
    std::memcpy(p, &first, sizeof first);
    std::memcpy(p + kLanes, &second, sizeof second);
  }
};

struct BFloat16 {  // the upper half of a float; of two that are neighbours one is already where a float has it
  using Stored = uint16_t;
  using Wide = float;
  using Bits = Vector<uint32_t>;
  static constexpr uint32_t kUpper = 0xFFFF0000u;
  static void read(const uint16_t* p, Vector<float>& first, Vector<float>& second) {
    Bits both;
    std::memcpy(&both, p, sizeof both);
    first = (Vector<float>)(both << 16);
    second = (Vector<float>)(both & kUpper);
  }
  // To the nearest, ties to even. NaN stays NaN without being asked for: here it comes from a bfloat16 or from `all`, so
  // its lower half is 0 and what rounding adds can't carry into the exponent.
  static Bits rounded(Vector<float> v) {
    const Bits bits = (Bits)v;
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
  }
  static void write(uint16_t* p, Vector<float> first, Vector<float> second) {
    const Bits both = (rounded(first) >> 16) | (rounded(second) & kUpper);
    std::memcpy(p, &both, sizeof both);
  }
};

struct Slopes {  // of the function, and in the backward pass of what is summed for the parameter
  double a, b, up, down;
};

template <class Kind>
struct Kernels {
  using T = typename Kind::Stored;
  using W = typename Kind::Wide;
  using V = Vector<W>;
  static constexpr int64_t kStep = 2 * kLanes;

  static V all(double value) { return V{} + W(value == value ? value : __builtin_nan("")); }

  static void forward_step(const T* x, T* y, V a, V b) {
    V v, w;
    Kind::read(x, v, w);
    Kind::write(y, v * (v > 0 ? a : b), w * (w > 0 ? a : b));
  }
  // Two sums, so that an addition needn't wait for the one before it.
  static void backward_step(const T* g, const T* s, T* dx, V a, V b, V up, V down, V& sum, V& other) {
    V v, w, d, e;
    Kind::read(s, v, w);
    Kind::read(g, d, e);
    Kind::write(dx, d * (v > 0 ? a : b), e * (w > 0 ? a : b));
    sum += d * v * (v > 0 ? up : down);
    other += e * w * (w > 0 ? up : down);
  }

  static void forward_block(const T* x, T* y, int64_t n, Slopes k) {
    const V a = all(k.a), b = all(k.b);
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) forward_step(x + i, y + i, a, b);
    if (i < n) {  // fewer than a step: padded with zeros
      T from[kStep] = {}, to[kStep];
      std::memcpy(from, x + i, (n - i) * sizeof(T));
      forward_step(from, to, a, b);
      std::memcpy(y + i, to, (n - i) * sizeof(T));
    }
  }
  static double backward_block(const T* g, const T* s, T* dx, int64_t n, Slopes k) {
    const V a = all(k.a), b = all(k.b), up = all(k.up), down = all(k.down);
    V sum{}, other{};
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) backward_step(g + i, s + i, dx + i, a, b, up, down, sum, other);
    if (i < n) {
      const size_t bytes = (n - i) * sizeof(T);
      T gs[kStep] = {}, ss[kStep] = {}, to[kStep];
      std::memcpy(gs, g + i, bytes);
      std::memcpy(ss, s + i, bytes);
      backward_step(gs, ss, to, a, b, up, down, sum, other);
      std::memcpy(dx + i, to, bytes);
    }
    sum += other;
    W total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    return total;
  }

  static int64_t left(int64_t n, int64_t i) { return n - i < kBlock ? n - i : kBlock; }

  static void forward(const T* x, T* y, int64_t n, Slopes k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += kBlock) forward_block(x + i, y + i, left(n, i), k);
  }
  static double backward(const T* g, const T* s, T* dx, int64_t n, Slopes k, int threads) {
    double total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
    for (int64_t i = 0; i < n; i += kBlock) total += backward_block(g + i, s + i, dx + i, left(n, i), k);
    return total;
  }
};

}  // namespace

#define LINL_KERNELS(NAME, KIND)                                                                              \
  extern "C" void forward_##NAME(const void* x, void* y, int64_t n, double a, double b, int threads) {       \
    using K = Kernels<KIND>;                                                                                 \
    K::forward((const K::T*)x, (K::T*)y, n, {a, b, 0, 0}, threads);                                          \
  }                                                                                                          \
  extern "C" double backward_##NAME(const void* g, const void* s, void* dx, int64_t n, double a, double b,   \
                                    double up, double down, int threads) {                                   \
    using K = Kernels<KIND>;                                                                                 \
    return K::backward((const K::T*)g, (const K::T*)s, (K::T*)dx, n, {a, b, up, down}, threads);             \
  }

LINL_KERNELS(float32, Plain<float>)
LINL_KERNELS(float64, Plain<double>)
LINL_KERNELS(bfloat16, BFloat16)
