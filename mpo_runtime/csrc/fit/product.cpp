#include "fit/product.hpp"

#include <algorithm>

#include "check.hpp"
#include "memory.hpp"
#include "program/pool.hpp"

namespace mpo {
namespace {

// Columns whose pairs are in the caches at once, rows of the left matrix, and rows of the right one that are arranged at once.
constexpr std::size_t kDepth = 512, kLeft = 256, kRight = 32 * kTileRight;

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

void add_products(const StridedMatrix& left, const StridedMatrix& right, std::size_t count, float* c, bool add, bool upper) {
  const PairKernels* const kernels = pair_kernels();
  expect(kernels != nullptr, "product: this CPU, or MPO_ISA, has no products of bf16");
  const std::size_t pairs = (count + 1) / 2, deep = kDepth / 2;
  const std::size_t stride = right.rows;
  static thread_local Memory memory;
  // Small enough that all threads have some of the rows.
  const std::size_t threads = static_cast<std::size_t>(pool().threads());
  const std::size_t some = std::min(kLeft, std::max(kTileLeft, round_up(left.rows / (4 * threads) + 1, kTileLeft)));
  for (std::size_t start = 0; start < right.rows; start += kRight) {
    const std::size_t stop = std::min(start + kRight, right.rows);
    const std::size_t panels = (stop - start + kTileRight - 1) / kTileRight;
    std::uint32_t* const arranged = memory.reserve<std::uint32_t>(panels * kTileRight * pairs);
    pool().run(panels, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t panel = begin; panel < end; ++panel)
        kernels->arrange(right, start + panel * kTileRight, kTileRight, 0, count, arranged + panel * kTileRight * pairs);
    });
    pool().run((left.rows + some - 1) / some, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t job = begin; job < end; ++job) {
        const std::size_t first = job * some, last = std::min(first + some, left.rows);
        if (upper && first >= stop) continue;  // all of it lies below the diagonal
        auto* const rows = reinterpret_cast<std::uint32_t*>(scratch_floats(round_up(last - first, kTileLeft) * deep));
        for (std::size_t at = 0; at < pairs; at += deep) {
          const std::size_t depth = std::min(deep, pairs - at);
          for (std::size_t row = first; row < last; row += kTileLeft)
            kernels->arrange(left, row, kTileLeft, 2 * at, std::min(2 * (at + depth), count), rows + (row - first) * deep);
          for (std::size_t panel = 0; panel < panels; ++panel) {
            const std::size_t column = start + panel * kTileRight;
            const std::size_t columns = std::min(kTileRight, stop - column);
            for (std::size_t row = first; row < last; row += kTileLeft) {
              if (upper && row >= column + columns) break;
              kernels->tile(rows + (row - first) * deep, arranged + (panel * pairs + at) * kTileRight, depth,
                            c + row * stride + column, stride, std::min(kTileLeft, last - row), columns, add || at > 0);
            }
          }
        }
      }
    });
  }
}

}  // namespace mpo
