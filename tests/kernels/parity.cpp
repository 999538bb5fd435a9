// Every level that this build can run against the generic one, on random shapes: prints one line a level, or what
// differs. Runs without Python, so that emulated builds and those for other CPUs can be tested.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "matvec.hpp"

namespace {

using namespace mpo;
std::mt19937 random_bits(7);

int below(int limit) { return static_cast<int>(random_bits() % static_cast<unsigned>(limit)); }

std::uint16_t to_half(float value) {  // exact for the values used here: few significant bits, no subnormals
  if (value == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(value), &exponent);
  const auto mantissa = static_cast<std::uint16_t>(std::lround(fraction * 2048)) & 0x3ff;
  return static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

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
        const std::uint16_t half = to_half(value());
        std::memcpy(&bytes[2 * i + 1], &half, 2);
      }
    };
    fill(low, values / 8 * static_cast<std::size_t>(low_bits(bits)));
    if (high_bits(bits)) fill(high, values / 8 * static_cast<std::size_t>(high_bits(bits)));
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
      else x[i] = std::normal_distribution<float>()(random_bits);
    }
    s.resize(batch * rows);
    for (auto& value : s) value = exact ? static_cast<float>(below(15) - 7) : std::normal_distribution<float>()(random_bits);
    w = {bits, rows, columns, group, low.data() + 1, high.empty() ? nullptr : high.data() + 1,
         reinterpret_cast<const std::uint16_t*>(scale.data() + 1),
         zeros ? reinterpret_cast<const std::uint16_t*>(zero.data() + 1) : nullptr};
  }

  // All results of the active level, one after another.
  std::vector<std::vector<float>> results() const {
    std::vector<std::vector<float>> all;
    const std::size_t begin = rows > 2 ? 1 : 0;
    for (const bool accumulate : {false, true}) {
      std::vector<float> y(batch * rows, 3.0f);
      const Activations prepared(x.data(), batch, columns);
      multiply(w, prepared, begin, rows, y.data(), rows, accumulate);
      all.push_back(y);
      std::fill(y.begin(), y.end(), 3.0f);
      multiply_exact(w, x.data(), batch, begin, rows, y.data(), rows, accumulate);
      all.push_back(y);
    }
    std::vector<float> y(batch * columns, 2.0f);
    add_transposed(w, s.data(), batch, rows, columns > group ? group : 0, columns, y.data(), columns);
    all.push_back(y);
    for (const Float type : {Float::f32, Float::f16, Float::bf16}) {
      std::vector<std::uint8_t> data(rows * columns * element_size(type) + 1);
      for (std::size_t i = 0; i < rows * columns; ++i) {
        float value;
        std::memcpy(&value, &dense[4 * i + 1], 4);
        std::uint32_t raw;
        std::memcpy(&raw, &value, 4);
        const std::uint16_t half = type == Float::f16 ? to_half(value) : static_cast<std::uint16_t>(raw >> 16);
        std::memcpy(&data[i * element_size(type) + 1], type == Float::f32 ? static_cast<const void*>(&raw) : &half,
                    element_size(type));
      }
      const std::size_t odd = rows > 1 ? 3 : 0;  // columns that no vector width divides
      const DenseMatrix matrix{type, rows - (odd ? 1 : 0), columns + odd / 3, data.data() + 1};
      if (matrix.rows * matrix.columns > rows * columns) continue;
      std::vector<float> padded(batch * matrix.columns, 1.0f), out(batch * rows, 3.0f), sums(batch * matrix.columns, 2.0f);
      for (std::size_t i = 0; i < batch * columns; ++i) padded[i] = x[i];
      multiply_dense(matrix, padded.data(), batch, 0, matrix.rows, out.data(), rows, true);
      all.push_back(out);
      add_transposed_dense(matrix, s.data(), batch, rows, 1, matrix.columns, sums.data(), matrix.columns);
      all.push_back(sums);
    }
    return all;
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

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 2;
  const std::vector<std::string> levels = supported_isas();
  const int widths[] = {8, 6, 5, 4, 3, 2};
  int failures = 0, cases = 0;
  for (int round = 0; round < rounds; ++round)
    for (const int bits : widths)
      for (const std::size_t group : {16, 32, 64, 128, 256})
        for (const bool zeros : {false, true})
          for (const bool exact : {true, false}) {
            const std::size_t columns = group * static_cast<std::size_t>(1 + below(static_cast<int>(640 / group)));
            const Case test(bits, group, static_cast<std::size_t>(1 + below(20)), columns,
                            static_cast<std::size_t>(1 + below(20)), zeros, exact);
            set_isa("generic");
            const auto expected = test.results();
            ++cases;
            for (const std::string& level : levels) {
              if (!set_isa(level)) return 2;
              const auto found = test.results();
              for (std::size_t i = 0; i < found.size(); ++i) {
                const double error = distance(found[i], expected[i]);
                if (error <= (exact ? 0.0 : 1e-5)) continue;
                ++failures;
                std::printf("%s: bits %d group %zu rows %zu columns %zu batch %zu zeros %d exact %d result %zu: %g\n",
                            level.c_str(), bits, group, test.rows, columns, test.batch, zeros, exact, i, error);
              }
            }
          }
  std::string names;
  for (const std::string& level : levels) names += " " + level;
  std::printf("%d cases, %d differences;%s\n", cases, failures, names.c_str());
  return failures ? 1 : 0;
}
