// The products and operations of every instruction set that this build can run, against the generic ones on random shapes:
// prints what differs, and a summary. Runs without Python, so that emulated builds and those for other CPUs can be tested.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.hpp"
#include "kernels/panels.hpp"
#include "kernels/products.hpp"
#include "level.hpp"

namespace {

using namespace mpo;
std::mt19937 random_bits(7);

int below(int limit) { return static_cast<int>(random_bits() % static_cast<unsigned>(limit)); }

float normal() { return std::normal_distribution<float>()(random_bits); }

std::vector<float> normals(std::size_t count, float size = 1.0f) {
  std::vector<float> values(count);
  for (float& value : values) value = size * normal();
  return values;
}

using Results = std::vector<std::vector<float>>;

struct Case {
  int bits;
  std::size_t group, rows, columns, batch;
  bool zeros, exact;  // exact: all products and sums are integers below 2^24, so levels must agree bit for bit
  std::vector<std::uint8_t> low, high, scale, zero, dense;  // each begins at an odd address and ends with its data
  std::vector<float> x, s;
  QuantizedMatrix w;

  Case(int bits_, std::size_t group_, std::size_t rows_, std::size_t columns_, std::size_t batch_, bool zeros_,
       bool exact_)
      : bits(bits_), group(group_), rows(rows_), columns(columns_), batch(batch_), zeros(zeros_), exact(exact_) {
    const std::size_t values = rows * columns, groups = values / group;
    const auto fill = [](std::vector<std::uint8_t>& bytes, std::size_t size) {
      bytes.resize(size + 1);
      for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random_bits());
    };
    const auto halves = [&](std::vector<std::uint8_t>& bytes, auto value) {
      bytes.resize(2 * groups + 1);
      for (std::size_t i = 0; i < groups; ++i) {
        const std::uint16_t half = float_to_half(value());
        std::memcpy(&bytes[2 * i + 1], &half, 2);
      }
    };
    const Width& width = width_of("case", bits);
    fill(low, values / 8 * static_cast<std::size_t>(width.low));
    if (width.high) fill(high, values / 8 * static_cast<std::size_t>(width.high));
    halves(scale, [&] { return exact ? static_cast<float>(1 - 2 * below(2)) : static_cast<float>(below(2001) - 1000) / 1024; });
    if (zeros) halves(zero, [&] { return static_cast<float>(below(1 << bits)) + (exact ? 0.0f : 0.25f); });
    dense.resize(values * 4 + 1);
    for (std::size_t i = 0; i < values; ++i) {
      const float value = static_cast<float>(below(63) - 31);
      std::memcpy(&dense[4 * i + 1], &value, 4);
    }
    x.resize(batch * columns);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (exact) x[i] = static_cast<float>(i % columns % 32 == 0 ? 127 : below(255) - 127);  // scale 1 in each block
      else x[i] = normal();
    }
    s.resize(batch * rows);
    for (auto& value : s) value = exact ? static_cast<float>(below(15) - 7) : normal();
    w = {bits, rows, columns, group, low.data() + 1, high.empty() ? nullptr : high.data() + 1,
         reinterpret_cast<const std::uint16_t*>(scale.data() + 1),
         zeros ? reinterpret_cast<const std::uint16_t*>(zero.data() + 1) : nullptr};
  }

  // All results of the active level, one after another.
  Results results() const {
    Results all;
    const std::size_t begin = rows > 2 ? 1 : 0;
    for (const bool accumulate : {false, true}) {
      std::vector<float> y(batch * rows, 3.0f);
      const Activations prepared(x.data(), batch, columns);
      const Task task{0, batch, begin, rows, {y.data(), rows}, accumulate};
      multiply(w, prepared, task);
      all.push_back(y);
      std::fill(y.begin(), y.end(), 3.0f);
      multiply_exact(w, {x.data(), columns}, task);
      all.push_back(y);
    }
    std::vector<float> y(batch * columns, 2.0f);
    add_transposed(w, {s.data(), rows}, {0, batch, columns > group ? group : 0, columns, {y.data(), columns}, true});
    all.push_back(y);
    std::vector<float> floats(rows * columns);
    active_level().dequantize(w, 0, rows * columns / group, floats.data());
    all.push_back(floats);
    for (const Type type : {Type::f32, Type::f16, Type::bf16}) {
      std::vector<std::uint8_t> data(rows * columns * element_size(type) + 1);
      for (std::size_t i = 0; i < rows * columns; ++i) {
        float value;
        std::memcpy(&value, &dense[4 * i + 1], 4);
        std::uint32_t raw;
        std::memcpy(&raw, &value, 4);
        const std::uint16_t half = type == Type::f16 ? float_to_half(value) : static_cast<std::uint16_t>(raw >> 16);
        std::memcpy(&data[i * element_size(type) + 1], type == Type::f32 ? static_cast<const void*>(&raw) : &half,
                    element_size(type));
      }
      const std::size_t odd = rows > 1 ? 3 : 0;  // columns that no vector width divides
      const DenseMatrix matrix{type, rows - (odd ? 1 : 0), columns + odd / 3, data.data() + 1};
      if (matrix.rows * matrix.columns > rows * columns) continue;
      std::vector<float> padded(batch * matrix.columns, 1.0f), out(batch * rows, 3.0f), sums(batch * matrix.columns, 2.0f);
      for (std::size_t i = 0; i < batch * columns; ++i) padded[i] = x[i];
      multiply_dense(matrix, {padded.data(), matrix.columns}, {0, batch, 0, matrix.rows, {out.data(), rows}, true});
      all.push_back(out);
      add_transposed_dense(matrix, {s.data(), rows}, {0, batch, 1, matrix.columns, {sums.data(), matrix.columns}, true});
      all.push_back(sums);
    }
    return all;
  }
};

// Random arguments of all operations.
struct OpsCase {
  std::size_t count, queries, positions, size;
  Type type;
  std::vector<float> x, y, weight, q, keys, values, a, b, c;

  OpsCase()
      : count(static_cast<std::size_t>(1 + below(200))),
        queries(static_cast<std::size_t>(1 + below(12))),
        positions(static_cast<std::size_t>(1 + below(150))),
        size(2 * static_cast<std::size_t>(1 + below(40))),
        type(std::vector<Type>{Type::f32, Type::f16, Type::bf16, Type::int8}[static_cast<std::size_t>(below(4))]),
        x(normals(count, 5)),
        y(normals(count)),
        weight(normals(count)),
        q(normals(queries * size)),
        keys(normals(positions * size)),
        values(normals(positions * size)),
        a(normals(queries * positions)),
        b(normals(positions * size)),
        c(normals(queries * size)) {
    for (const float unusual : {0.0f, -87.5f, 88.5f, -1e30f, 1e30f, 1e-40f})
      x[static_cast<std::size_t>(below(static_cast<int>(count)))] = unusual;
    if (below(4) == 0) values[0] = 70000.0f;  // beyond half precision
  }

  Results results() const {
    const Ops& ops = *active_level().ops;
    Results all;
    std::vector<float> out(count);
    ops.rms_norm(y.data(), weight.data(), count, 1e-5f, out.data());
    all.push_back(out);
    ops.layer_norm(y.data(), weight.data(), x.data(), count, 1e-5f, out.data());
    for (float& value : out) value = std::fabs(value) > 1e20f ? value / 1e30f : value;
    all.push_back(out);
    ops.gelu(x.data(), count, out.data());
    for (float& value : out) value = std::fabs(value) > 1e20f ? value / 1e30f : value;
    all.push_back(out);
    ops.swiglu(x.data(), y.data(), count, out.data());
    // Errors are measured against the whole, in which one large value would hide the others.
    for (float& value : out) value = std::fabs(value) > 1e20f ? value / 1e30f : value;
    all.push_back(out);
    ops.add_scaled(y.data(), weight.data(), count, 0.22f, out.data());
    all.push_back(out);
    ops.multiply(y.data(), count, 0.7f, out.data());
    all.push_back(out);
    const std::size_t block = 16u << count % 5;
    std::vector<float> transformed(block * (1 + count % 3));
    for (std::size_t i = 0; i < transformed.size(); ++i) transformed[i] = values[i % values.size()];
    ops.hadamard(transformed.data(), transformed.size(), block, transformed.data());
    all.push_back(transformed);
    std::vector<float> turned(size);
    ops.rotate(q.data(), keys.data(), c.data(), size, turned.data());
    all.push_back(turned);
    std::vector<float> product = c;
    ops.add_product({queries, size, positions, {a.data(), positions}, {b.data(), size}, {product.data(), size}});
    all.push_back(product);
    attend(ops, all);
    return all;
  }

  // Keys and values are stored in the cache's type first; what is stored must be the same at every level.
  void attend(const Ops& ops, Results& all) const {
    const std::size_t bytes = size * element_size(type), half = kPagePositions * (bytes + sizeof(float));
    const std::size_t codes = (kPagePositions * bytes + 63) / 64 * 64, scales = kPagePositions * sizeof(float);
    const KvPlace offsets{type, nullptr, 0, codes, 2 * codes, 2 * codes + scales, size};
    std::vector<std::vector<std::uint8_t>> pages;
    for (std::size_t p = 0; p < positions; p += kPagePositions) pages.emplace_back(2 * (half + 64));
    for (int i = 0; i < 2; ++i) {
      std::vector<float> read(positions * size), stored;
      for (std::size_t p = 0; p < positions; ++p) {
        std::uint8_t* page = pages[p / kPagePositions].data();
        std::uint8_t* to = page + (i ? offsets.values : offsets.keys) + p % kPagePositions * bytes;
        auto* scale = reinterpret_cast<float*>(page + (i ? offsets.value_scales : offsets.key_scales)) + p % kPagePositions;
        ops.store((i ? values : keys).data() + p * size, size, type, to, scale);
        ops.widen(type, to, *scale, size, read.data() + p * size);
        stored.insert(stored.end(), to, to + bytes);
      }
      all.push_back(read);
      all.push_back(stored);
    }
    std::vector<const std::uint8_t*> table;
    for (const auto& page : pages) table.push_back(page.data());
    std::vector<const float*> rows;
    std::vector<std::size_t> firsts, limits;
    for (std::size_t m = 0; m < queries; ++m) {
      rows.push_back(q.data() + m * size);
      limits.push_back((m * 37) % (positions + 1));
      firsts.push_back(m % 3 ? limits.back() * m / (queries + 1) : 0);
    }
    KvPlace place = offsets;
    place.pages = table.data();
    for (const bool few : {true, false}) {
      std::vector<float> mixed(queries * size), peaks(queries), sums(queries);
      ops.attend({place, positions / 3 / kPagePositions / 2 * 2 * kPagePositions, positions, few, queries, rows.data(),
                  firsts.data(), limits.data(), 0.3f, mixed.data(), peaks.data(), sums.data()});
      for (float& peak : peaks) peak = std::isinf(peak) ? -1.0f : peak;
      all.insert(all.end(), {mixed, peaks, sums});
    }
  }
};

float rounded(float value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(float_to_bf16(value)) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Products in panels against plain loops in double precision. x and the weights are rounded as the panels round them: AMX to
// bf16, the others x to int8 codes (of weights that are integers) or not at all.
struct PanelCase {
  enum Kind { integers, computed, bf16, floats, exact_integers, kinds };
  Case of;
  std::vector<std::uint16_t> stored;  // bf16 [rows, columns]
  std::vector<float> values;

  PanelCase(int bits, std::size_t group, std::size_t rows, std::size_t columns, std::size_t batch, bool zeros, bool exact)
      : of(bits, group, rows, columns, batch, zeros, exact), values(normals(rows * columns)) {
    for (const float value : values) stored.push_back(float_to_bf16(value));
  }

  DenseMatrix dense(Kind kind) const {
    if (kind == bf16) return {Type::bf16, of.rows, of.columns, stored.data()};
    return {Type::f32, of.rows, of.columns, values.data()};
  }

  // What each kind gives at the active level, and what it should give; a level without panels gives nothing.
  Results results() const { return all(false); }
  Results expected() const { return all(true); }

  Results all(bool plain) const {
    const PanelSet *rough = active_level().panels, *fine = active_level().float_panels;
    Results found;
    for (int kind = 0; rough && kind < kinds; ++kind) {
      const PanelKernels* kernels = kind == integers   ? rough->integers[panel_order(of.bits)]
                                    : kind == computed ? rough->computed
                                    : kind == bf16     ? rough->bf16
                                    : kind == floats   ? rough->floats
                                                       : fine->integers[panel_order(of.bits)];
      if (!kernels) continue;
      std::vector<float> y(of.batch * of.rows, 3.0f);
      if (plain) plainly(static_cast<Kind>(kind), y);
      else in_panels(*kernels, static_cast<Kind>(kind), y);
      found.push_back(y);
    }
    return found;
  }

  void plainly(Kind kind, std::vector<float>& y) const {
    const bool amx = std::string(active_level().name) == "amx", codes = kind == integers && !amx;
    const bool to_bf16 = amx && (kind == integers || kind == computed);
    std::vector<float> weights = values, x = of.x;
    if (kind == bf16) std::transform(values.begin(), values.end(), weights.begin(), rounded);
    if (kind == integers || kind == exact_integers) dequantize_generic(of.w, 0, weights.size() / of.group, weights.data());
    if (codes) round_to_codes(x);
    for (std::size_t t = 0; t < of.batch; ++t)
      for (std::size_t r = 0; r < of.rows; ++r) {
        double sum = 0;
        for (std::size_t c = 0; c < of.columns; ++c) {
          const float a = weights[r * of.columns + c], b = x[t * of.columns + c];
          sum += to_bf16 ? static_cast<double>(rounded(a)) * rounded(b) : static_cast<double>(a) * b;
        }
        y[t * of.rows + r] += static_cast<float>(sum);
      }
  }

  void round_to_codes(std::vector<float>& x) const {
    for (std::size_t t = 0; t < of.batch; ++t)
      for (std::size_t c = 0; c < of.columns; c += kScaleBlock) {
        const std::size_t end = std::min(c + kScaleBlock, of.columns);
        float* row = x.data() + t * of.columns;
        float largest = 0;
        for (std::size_t i = c; i < end; ++i) largest = std::max(largest, std::fabs(row[i]));
        if (largest == 0) continue;
        const float inverse = 127.0f / largest;
        for (std::size_t i = c; i < end; ++i) row[i] = largest / 127.0f * std::nearbyint(row[i] * inverse);
      }
  }

  void in_panels(const PanelKernels& kernels, Kind kind, std::vector<float>& y) const {
    const std::size_t groups = panel_count(of.batch), panels = panel_count(of.rows), rows = kPanelRows;
    std::vector<float> sums(panels * groups * kPanelSums);
    for (std::size_t c = 0; c < of.columns; c += kPanelChunk) {
      const std::size_t wide = std::min(kPanelChunk, of.columns - c), steps = panel_steps(wide);
      const std::size_t w_size = steps * kernels.w_bytes, x_size = steps * kernels.x_bytes;
      Memory memory;
      std::uint8_t* w = memory.reserve<std::uint8_t>(panels * w_size + groups * x_size);
      std::uint8_t* x = w + panels * w_size;
      for (std::size_t g = 0; g < groups; ++g)
        kernels.arrange({of.x.data() + g * rows * of.columns + c, of.columns}, std::min(rows, of.batch - g * rows), wide,
                        x + g * x_size);
      for (std::size_t p = 0; p < panels; ++p) {
        const PanelRows to{std::min(rows, of.rows - p * rows), wide, w + p * w_size, 0};
        if (kind == integers || kind == exact_integers) kernels.unpack(of.w, p * rows, c, to);
        else if (kind == computed) kernels.round({values.data() + p * rows * of.columns + c, of.columns}, to);
        else kernels.copy(dense(kind), p * rows, c, to);
      }
      const PanelCodes codes{of.bits, of.group == 16, of.zeros};
      kernels.multiply({w, x, panels, of.batch, steps, codes, sums.data(), c == 0, false});
    }
    kernels.add(sums.data(), groups, {0, of.batch, 0, of.rows, {y.data(), of.rows}, true});
  }
};

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / (size > 0 ? size : 1));
}

// Values to round, with a random symmetric Hessian that is far from singular.
struct FitCase {
  std::size_t group, columns;
  Levels levels;
  std::vector<float> values, hessian, feedback, weight, ones;
  static constexpr float kFactors[3] = {0.7f, 0.85f, 1.0f};

  FitCase(int bits, std::size_t group_, bool zeros)
      : group(group_),
        columns(group * static_cast<std::size_t>(1 + below(static_cast<int>(160 / group)))),
        levels{bits, zeros, kFactors, 3, 1},
        values(normals(columns * kFitRows)),
        hessian(columns * columns, 0.0f),
        feedback(columns * columns, 0.0f),
        weight(columns),
        ones(columns, 0.0f) {
    const std::vector<float> upper = normals(columns * columns, 0.3f / std::sqrt(static_cast<float>(columns)));
    for (std::size_t i = 0; i < columns; ++i)
      for (std::size_t j = i; j < columns; ++j) feedback[i * columns + j] = i == j ? 1.0f : upper[i * columns + j];
    for (std::size_t j = 0; j < columns; ++j) weight[j] = 0.5f + static_cast<float>(j % 7);
    for (std::size_t i = 0; i < columns; ++i)
      for (std::size_t j = 0; j < columns; ++j) {
        for (std::size_t k = i > j ? i : j; k < columns; ++k)
          hessian[i * columns + j] += feedback[i * columns + k] * weight[k] * feedback[j * columns + k];
        if (i / group == j / group) ones[i] += hessian[i * columns + j];
      }
  }

  // The errors of searched grids, and what compensated rounding with descent leaves of each row. Which of two nearly equal
  // grids or codes is taken may differ between levels, so the codes themselves are not compared.
  Results results() const {
    const Fits& fits = *active_level().fits;
    const std::size_t groups = columns / group;
    std::vector<float> scale(groups * kFitRows), zero(scale), error(kFitRows), rest = values, codes(values);
    fits.search({levels, values.data(), weight.data(), group, scale.data(), zero.data(), error.data()});
    std::vector<float> work(round_work(columns, group));
    fits.round({levels, columns, group, hessian.data(), feedback.data(), weight.data(), ones.data(), 3, 0.0f, rest.data(),
                codes.data(), scale.data(), zero.data(), work.data()});
    double total = 0;
    for (std::size_t r = 0; r < kFitRows; ++r)
      for (std::size_t i = 0; i < columns; ++i)
        for (std::size_t j = 0; j < columns; ++j)
          total += static_cast<double>(rest[i * kFitRows + r] * hessian[i * columns + j] * rest[j * kFitRows + r]);
    std::vector<float> stored(values.size());  // what codes, scales and zeros stand for, and what is left, make the values
    for (std::size_t j = 0; j < columns; ++j)
      for (std::size_t r = 0; r < kFitRows; ++r) {
        const std::size_t at = j / group * kFitRows + r, here = j * kFitRows + r;
        stored[here] = scale[at] * (codes[here] - zero[at]) + rest[here];
      }
    return {error, {static_cast<float>(total)}, {static_cast<float>(distance(stored, values) < 1e-5)}};
  }
};

// How many results of a level differ from the generic ones; prints them, each with `what`.
template <class Any>
int differences(const Any& test, const std::string& level, const Results& expected, double tolerance,
                const std::string& what) {
  if (!set_level(level)) std::abort();
  const Results found = test.results();
  int count = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double error = distance(found[i], expected[i]);
    if (error <= tolerance) continue;
    ++count;
    std::printf("%s: %s, result %zu: %g\n", level.c_str(), what.c_str(), i, error);
  }
  return count;
}

// A width or group without a kernel must be refused, not treated like another one.
int accepted() {
  int count = 0;
  const auto expect_refusal = [&](auto call) {
    try {
      call();
      ++count;
      std::printf("an unknown width, group or type was accepted\n");
    } catch (const std::invalid_argument&) {
    }
  };
  for (const int bits : {-1, 0, 1, 7, 9, 16}) expect_refusal([&] { with_planes(bits, [](auto) {}); });
  for (const std::size_t group : {0, 8, 48, 512}) expect_refusal([&] { with_group(group, [](auto) {}); });
  expect_refusal([] { with_float_type(Type::int8, [](auto) {}); });
  return count;
}

template <class... Numbers>
std::string described(const char* format, Numbers... numbers) {
  char text[200];
  std::snprintf(text, sizeof text, format, numbers...);
  return text;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 2;
  const std::vector<std::string> levels = supported_levels();
  int failures = accepted(), cases = 0;
  for (int round = 0; round < rounds; ++round)
    for (const Width& width : kWidths)
      for (const int size : kGroups)
        for (const bool zeros : {false, true})
          for (const bool exact : {true, false}) {
            const auto group = static_cast<std::size_t>(size);
            const std::size_t columns = group * static_cast<std::size_t>(1 + below(640 / size));
            const Case test(width.bits, group, static_cast<std::size_t>(1 + below(20)), columns,
                            static_cast<std::size_t>(1 + below(20)), zeros, exact);
            set_level("generic");
            const Results expected = test.results();
            ++cases;
            const std::string what = described("bits %d group %d rows %zu columns %zu batch %zu zeros %d exact %d", test.bits,
                                               size, test.rows, columns, test.batch, zeros, exact);
            for (const std::string& level : levels)
              failures += differences(test, level, expected, exact ? 0.0 : 1e-5, what);
          }
  for (const Width& width : kWidths)
    for (const int size : kGroups) {
      const auto group = static_cast<std::size_t>(size);
      const std::size_t columns = group * static_cast<std::size_t>(1 + below(1100 / size));
      const bool zeros = below(2) == 1, exact = below(2) == 1;
      const PanelCase test(width.bits, group, static_cast<std::size_t>(1 + below(70)), columns,
                           static_cast<std::size_t>(1 + below(70)), zeros, exact);
      ++cases;
      const std::string what = described("panels of bits %d group %d rows %zu columns %zu batch %zu", width.bits, size,
                                         test.of.rows, columns, test.of.batch);
      for (const std::string& level : levels) {
        set_level(level);
        failures += differences(test, level, test.expected(), 1e-5, what);
      }
    }
  for (int round = 0; round < 60 * rounds; ++round) {
    const OpsCase test;
    set_level("generic");
    const Results expected = test.results();
    ++cases;
    const std::string what = described("operations on %zu values, %zu queries, %zu positions, size %zu, type %d", test.count,
                                       test.queries, test.positions, test.size, static_cast<int>(test.type));
    for (const std::string& level : levels) failures += differences(test, level, expected, 1e-5, what);
  }
  for (int round = 0; round < rounds; ++round)
    for (const Width& width : kWidths)
      for (const bool zeros : {false, true}) {
        const auto group = static_cast<std::size_t>(16 << below(4));
        const FitCase test(width.bits, group, zeros);
        set_level("generic");
        const Results expected = test.results();
        ++cases;
        const std::string what = described("rounding to %d bits, group %zu, columns %zu, zeros %d", width.bits, group,
                                           test.columns, static_cast<int>(zeros));
        for (const std::string& level : levels) failures += differences(test, level, expected, 5e-3, what);
      }
  std::string names;
  for (const std::string& level : levels) names += " " + level;
  std::printf("%d cases, %d differences;%s\n", cases, failures, names.c_str());
  return failures ? 1 : 0;
}
