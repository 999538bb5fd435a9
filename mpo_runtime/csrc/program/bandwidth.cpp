#include "program/bandwidth.hpp"

#include <atomic>
#include <chrono>

#include "program/pool.hpp"
#include "target.hpp"

#if MPO_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace mpo {
namespace {

#if MPO_X86
__attribute__((target("clflushopt"))) void evict_range(const std::uint64_t* data, std::size_t begin, std::size_t end) {
  constexpr std::size_t kLine = 8;
  for (std::size_t i = begin; i < end; i += kLine) _mm_clflushopt(const_cast<std::uint64_t*>(data + i));
}

bool can_evict() {
  std::uint32_t a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 23 & 1u);
}
#endif

}  // namespace

void evict([[maybe_unused]] const std::uint64_t* data, [[maybe_unused]] std::size_t words) {
#if MPO_X86
  if (!can_evict()) return;
  pool().run(words, std::size_t{1} << 17, [&](std::size_t begin, std::size_t end) { evict_range(data, begin, end); });
#endif
}

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
