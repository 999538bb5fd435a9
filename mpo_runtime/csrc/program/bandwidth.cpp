#include "program/bandwidth.hpp"

#include <atomic>
#include <chrono>

#include "program/pool.hpp"

namespace mpo {

double read_bandwidth(const std::uint64_t* data, std::size_t words) {
  constexpr std::size_t kPiece = std::size_t{1} << 17;  // a mebibyte: as large as what a kernel is handed at a time
  std::atomic<std::uint64_t> total{0};
  const auto start = std::chrono::steady_clock::now();
  pool().run(words, kPiece, [&](std::size_t begin, std::size_t end) {
    std::uint64_t sums[8] = {};  // independent, so that the adds do not wait for each other
    std::size_t i = begin;
    for (; i + 8 <= end; i += 8)
      for (std::size_t k = 0; k < 8; ++k) sums[k] += data[i + k];
    for (; i < end; ++i) sums[0] += data[i];
    for (std::size_t k = 1; k < 8; ++k) sums[0] += sums[k];
    total.fetch_add(sums[0], std::memory_order_relaxed);  // the sum is used, so the loop stays
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(words) * sizeof(std::uint64_t) / seconds.count();
}

}  // namespace mpo
