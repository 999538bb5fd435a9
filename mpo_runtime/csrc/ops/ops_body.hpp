// The operations of ops.hpp, written once over the vectors X of an instruction set. Included after the target is set (see
// target.hpp).
#pragma once

#include "ops/ops.hpp"

namespace mpo {
namespace {

template <class X>
struct OpsBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;
  static constexpr float kLargestHalf = 65504.0f;

  // exp(x) to about 2e-7 relative: 2^n times a polynomial of degree 6 on |r| <= ln 2 / 2 (coefficients of Cephes' expf).
  // Below -87 it is 0, above 88 it stays at exp(88).
  static MPO_INLINE F exponential(F x) {
    const F clipped = X::larger(X::smaller(x, X::broadcast(88.0f)), X::broadcast(-87.3f));
    const F n = X::round(X::multiply(clipped, X::broadcast(1.44269504088896341f)));
    F r = X::fma(n, X::broadcast(-0.693359375f), clipped);
    r = X::fma(n, X::broadcast(2.12194440e-4f), r);
    F p = X::broadcast(1.9875691500e-4f);
    p = X::fma(p, r, X::broadcast(1.3981999507e-3f));
    p = X::fma(p, r, X::broadcast(8.3334519073e-3f));
    p = X::fma(p, r, X::broadcast(4.1665795894e-2f));
    p = X::fma(p, r, X::broadcast(1.6666665459e-1f));
    p = X::fma(p, r, X::broadcast(5.0000001201e-1f));
    p = X::fma(p, X::multiply(r, r), X::add(r, X::broadcast(1.0f)));
    return X::zero_below(x, X::broadcast(-87.3f), X::scale_by_power(p, n));
  }

  static void rms_norm(const float* x, const float* w, std::size_t count, float eps, float* y) {
    F sums[2] = {X::zero(), X::zero()};
    std::size_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
      for (std::size_t u = 0; u < 2; ++u) {
        const F value = X::load(x + i + u * kLanes);
        sums[u] = X::fma(value, value, sums[u]);
      }
    float total = X::total(X::add(sums[0], sums[1]));
    for (std::size_t j = i; j < count; ++j) total += x[j] * x[j];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + eps);
    for (i = 0; i + kLanes <= count; i += kLanes)
      X::store(y + i, X::multiply(X::multiply(X::load(x + i), X::broadcast(factor)), X::load(w + i)));
    for (; i < count; ++i) y[i] = x[i] * factor * w[i];
  }

  static void layer_norm(const float* x, const float* w, const float* b, std::size_t count, float eps, float* y) {
    F sums = X::zero();
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums = X::add(sums, X::load(x + i));
    float total = X::total(sums);
    for (std::size_t j = i; j < count; ++j) total += x[j];
    const float mean = total / static_cast<float>(count);
    F squares = X::zero();
    for (i = 0; i + kLanes <= count; i += kLanes) {
      const F value = X::subtract(X::load(x + i), X::broadcast(mean));
      squares = X::fma(value, value, squares);
    }
    float square = X::total(squares);
    for (std::size_t j = i; j < count; ++j) square += (x[j] - mean) * (x[j] - mean);
    const float factor = 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
    for (i = 0; i + kLanes <= count; i += kLanes) {
      const F value = X::multiply(X::subtract(X::load(x + i), X::broadcast(mean)), X::broadcast(factor));
      X::store(y + i, X::fma(value, X::load(w + i), X::load(b + i)));
    }
    for (; i < count; ++i) y[i] = (x[i] - mean) * factor * w[i] + b[i];
  }

  // x / (1 + exp(minus))
  static MPO_INLINE F logistic(F x, F minus) {
    const F beyond = X::larger(X::subtract(minus, X::broadcast(88.0f)), X::zero());  // to infinity, as exp does
    return X::divide(x, X::fma(beyond, X::broadcast(3e38f), X::add(X::broadcast(1.0f), exponential(minus))));
  }

  // (1 + tanh z) / 2 is 1 / (1 + exp(-2 z)).
  static void gelu(const float* x, std::size_t count, float* y) {
    constexpr float kLinear = -1.5957691216f, kCubic = -0.0713548162726f;  // of -2 z
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const F value = X::load(x + i);
      const F factor = X::fma(X::multiply(value, value), X::broadcast(kCubic), X::broadcast(kLinear));
      X::store(y + i, logistic(value, X::multiply(value, factor)));
    }
    for (; i < count; ++i) y[i] = x[i] / (1.0f + std::exp(x[i] * (kCubic * x[i] * x[i] + kLinear)));
  }

  static void swiglu(const float* gate, const float* up, std::size_t count, float* y) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const F g = X::load(gate + i);
      X::store(y + i, X::multiply(logistic(g, X::subtract(X::zero(), g)), X::load(up + i)));
    }
    for (; i < count; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }

  static void add_scaled(const float* a, const float* b, std::size_t count, float scale, float* y) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      X::store(y + i, X::fma(X::load(b + i), X::broadcast(scale), X::load(a + i)));
    for (; i < count; ++i) y[i] = a[i] + scale * b[i];
  }

  static void multiply(const float* x, std::size_t count, float scale, float* y) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) X::store(y + i, X::multiply(X::load(x + i), X::broadcast(scale)));
    for (; i < count; ++i) y[i] = x[i] * scale;
  }

  // Signs[j][k] = (-1)^(bits that j and k have in common), of the elements of one vector.
  struct Signs {
    alignas(64) float at[kLanes][kLanes];
    constexpr Signs() : at() {
      for (std::size_t j = 0; j < kLanes; ++j)
        for (std::size_t k = 0; k < kLanes; ++k) {
          bool odd = false;
          for (std::size_t common = j & k; common; common &= common - 1) odd = !odd;
          at[j][k] = odd ? -1.0f : 1.0f;
        }
    }
  };

  // The transform of a block is that of each vector, as a product with the matrix of signs, then Walsh's sums and differences
  // of whole vectors.
  static void hadamard(const float* x, std::size_t count, std::size_t block, float* y) {
    static constexpr Signs signs;
    const F factor = X::broadcast(1.0f / std::sqrt(static_cast<float>(block)));
    for (std::size_t start = 0; start < count; start += block, x += block, y += block) {
      for (std::size_t i = 0; i < block; i += kLanes) {
        F sums[2] = {X::zero(), X::zero()};
        for (std::size_t j = 0; j < kLanes; ++j)
          sums[j % 2] = X::fma(X::broadcast(x[i + j]), X::load(signs.at[j]), sums[j % 2]);
        X::store(y + i, X::multiply(X::add(sums[0], sums[1]), factor));
      }
      for (std::size_t size = kLanes; size < block; size *= 2)
        for (std::size_t pair = 0; pair < block; pair += 2 * size)
          for (std::size_t i = pair; i < pair + size; i += kLanes) {
            const F a = X::load(y + i), b = X::load(y + i + size);
            X::store(y + i, X::add(a, b));
            X::store(y + i + size, X::subtract(a, b));
          }
    }
  }

  static void rotate(const float* x, const float* cosine, const float* sine, std::size_t size, float* y) {
    const std::size_t half = size / 2;
    std::size_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const F a = X::load(x + i), b = X::load(x + half + i), c = X::load(cosine + i), s = X::load(sine + i);
      X::store(y + i, X::subtract(X::multiply(a, c), X::multiply(b, s)));
      X::store(y + half + i, X::fma(b, c, X::multiply(a, s)));
    }
    for (; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      y[i] = a * cosine[i] - b * sine[i];
      y[half + i] = b * cosine[i] + a * sine[i];
    }
  }

  static void store(const float* x, std::size_t size, Type type, std::uint8_t* to, float* scale) {
    std::size_t i = 0;
    switch (type) {
      case Type::f32: std::memcpy(to, x, size * 4); return;
      case Type::f16:
        // Beyond the range of half precision the largest half is stored: one infinity would make attention give NaN.
        for (; i + kLanes <= size; i += kLanes) {
          const F value = X::smaller(X::load(x + i), X::broadcast(kLargestHalf));
          X::store_halves(to + 2 * i, X::larger(value, X::broadcast(-kLargestHalf)));
        }
        for (; i < size; ++i) {
          const std::uint16_t bits = float_to_half(std::clamp(x[i], -kLargestHalf, kLargestHalf));
          std::memcpy(to + 2 * i, &bits, 2);
        }
        return;
      case Type::bf16:
        for (; i < size; ++i) {
          const std::uint16_t bits = float_to_bf16(x[i]);
          std::memcpy(to + 2 * i, &bits, 2);
        }
        return;
      case Type::int8: break;
    }
    float largest = 0;
    bool finite = true;
    for (i = 0; i < size; ++i) {
      largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
      finite = finite && std::isfinite(x[i]);
    }
    if (!finite) {  // no code stands for NaN, so the scale does: what attends to it becomes NaN
      *scale = std::numeric_limits<float>::quiet_NaN();
      std::memset(to, 0, size);
      return;
    }
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    *scale = largest > 1e-30f ? largest / 127.0f : 0.0f;
    for (i = 0; i < size; ++i) {
      const auto code = static_cast<std::int8_t>(std::lrintf(x[i] * inverse));
      std::memcpy(to + i, &code, 1);
    }
  }

  // -- small matrix products

  // The rows [first, first + M) of c.
  template <int M>
  static MPO_INLINE void product_rows(const ProductTask& task, std::size_t first) {
    const std::size_t n = task.n, k = task.k;
    const Rows<const float> a = task.a.from(first), b = task.b;
    const Rows<float> c = task.c.from(first);
    std::size_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
      F sums[M][2];
      for (std::size_t m = 0; m < M; ++m)
        for (std::size_t u = 0; u < 2; ++u) sums[m][u] = X::load(c.row(m) + j + u * kLanes);
      for (std::size_t i = 0; i < k; ++i) {
        const F left = X::load(b.row(i) + j), right = X::load(b.row(i) + j + kLanes);
        for (std::size_t m = 0; m < M; ++m) {
          const F factor = X::broadcast(a.row(m)[i]);
          sums[m][0] = X::fma(factor, left, sums[m][0]);
          sums[m][1] = X::fma(factor, right, sums[m][1]);
        }
      }
      for (std::size_t m = 0; m < M; ++m)
        for (std::size_t u = 0; u < 2; ++u) X::store(c.row(m) + j + u * kLanes, sums[m][u]);
    }
    for (; j + kLanes <= n; j += kLanes) {
      F sums[M];
      for (std::size_t m = 0; m < M; ++m) sums[m] = X::load(c.row(m) + j);
      for (std::size_t i = 0; i < k; ++i) {
        const F column = X::load(b.row(i) + j);
        for (std::size_t m = 0; m < M; ++m) sums[m] = X::fma(X::broadcast(a.row(m)[i]), column, sums[m]);
      }
      for (std::size_t m = 0; m < M; ++m) X::store(c.row(m) + j, sums[m]);
    }
    for (; j < n; ++j)
      for (std::size_t m = 0; m < M; ++m) {
        float sum = 0;
        for (std::size_t i = 0; i < k; ++i) sum += a.row(m)[i] * b.row(i)[j];
        c.row(m)[j] += sum;
      }
  }

  static MPO_INLINE void add_product(const ProductTask& task) {
    std::size_t i = 0;
    for (; i + 4 <= task.m; i += 4) product_rows<4>(task, i);
    for (; i < task.m; ++i) product_rows<1>(task, i);
  }
};

}  // namespace
}  // namespace mpo
