// Error-compensated rounding (Frantar et al. 2023) of kFitRows rows, and coordinate descent on the same error, written once
// over the vectors X of an instruction set. Included after the target is set (see target.hpp).
//
// The residual w - w^ of all columns is kept in `wanted`, and the gradient H (w - w^) in `gradient`. Both are updated by
// products with blocks of H: a pass over a row of I columns takes I^2 multiply-adds, as one product with H does.
#pragma once

#include "fit/cells_body.hpp"
#include "fit/search_body.hpp"

namespace mpo {
namespace {

template <class X>
struct RoundBody {
  using F = typename X::Floats;
  using Search = SearchBody<X>;
  static constexpr std::size_t kLanes = X::kLanes, kRows = kFitRows;

  // -- products with a matrix of kRows columns

  // A matrix with element (m, k) at data[m * down + k * along].
  struct Strided {
    const float* data;
    std::size_t down, along;
    MPO_INLINE Strided from(std::size_t m, std::size_t k) const { return {data + m * down + k * along, down, along}; }
  };

  // Tiles that fill the registers: M rows of U vectors.
  static constexpr std::size_t kTileRows = kLanes == 16 ? 6 : 4, kTileVectors = kLanes == 16 ? 4 : 2;

  template <std::size_t M>
  static MPO_INLINE void product_tile(const Strided& a, const float* b, std::size_t count, float* c) {
    F sums[M][kTileVectors];
    for (std::size_t m = 0; m < M; ++m)
      for (std::size_t u = 0; u < kTileVectors; ++u) sums[m][u] = X::load(c + m * kRows + u * kLanes);
    for (std::size_t k = 0; k < count; ++k) {
      F right[kTileVectors];
      for (std::size_t u = 0; u < kTileVectors; ++u) right[u] = X::load(b + k * kRows + u * kLanes);
      for (std::size_t m = 0; m < M; ++m) {
        const F left = X::broadcast(a.data[m * a.down + k * a.along]);
        for (std::size_t u = 0; u < kTileVectors; ++u) sums[m][u] = X::fma(left, right[u], sums[m][u]);
      }
    }
    for (std::size_t m = 0; m < M; ++m)
      for (std::size_t u = 0; u < kTileVectors; ++u) X::store(c + m * kRows + u * kLanes, sums[m][u]);
  }

  // c [rows, kRows] += a [rows, count] b [count, kRows]
  static void add_product(const Strided& a, const float* b, std::size_t rows, std::size_t count, float* c) {
    for (std::size_t k = 0; k < count; k += kFitBlock) {  // so that this part of b stays in the first cache
      const std::size_t part = std::min(kFitBlock, count - k);
      for (std::size_t lane = 0; lane < kRows; lane += kTileVectors * kLanes) {
        std::size_t m = 0;
        for (; m + kTileRows <= rows; m += kTileRows)
          product_tile<kTileRows>(a.from(m, k), b + k * kRows + lane, part, c + m * kRows + lane);
        for (; m < rows; ++m) product_tile<1>(a.from(m, k), b + k * kRows + lane, part, c + m * kRows + lane);
      }
    }
  }

  // c[j] += factors[j] x for the columns j of c [count, kRows], x [kRows]
  static MPO_INLINE void add_outer(const float* factors, std::size_t stride, const float* x, std::size_t count, float* c) {
    for (std::size_t lane = 0; lane < kRows; lane += 4 * kLanes) {
      F part[4];
      for (std::size_t u = 0; u < 4; ++u) part[u] = X::load(x + lane + u * kLanes);
      for (std::size_t j = 0; j < count; ++j) {
        const F factor = X::broadcast(factors[j * stride]);
        float* at = c + j * kRows + lane;
        for (std::size_t u = 0; u < 4; ++u)
          X::store(at + u * kLanes, X::fma(factor, part[u], X::load(at + u * kLanes)));
      }
    }
  }

  // -- blocks of columns

  static std::size_t block_end(const RoundTask& task, std::size_t begin) {
    const std::size_t size = std::max(task.group, kFitBlock / task.group * task.group);
    return std::min(begin + size, task.columns);
  }
  static std::size_t inner_size(const RoundTask& task) {
    return task.group > kFitInner ? std::min(task.group, kFitInner) : kFitInner / task.group * task.group;
  }

  // -- the pass over the columns

  // With H = R R^T the error of the columns up to j is least, whatever the later ones become, when column j is rounded from
  // w_j + sum over i < j of (w_i - w^_i) R_ij / R_jj (Chee et al. 2023, theorem 6).
  static void sweep(const RoundTask& task, float* rest) {
    const std::size_t columns = task.columns, group = task.group, inner = inner_size(task);
    std::memcpy(rest, task.wanted, columns * kRows * sizeof(float));
    for (std::size_t begin = 0, end; begin < columns; begin = end) {
      end = block_end(task, begin);
      for (std::size_t near = begin; near < end; near += inner) {
        const std::size_t stop = std::min(near + inner, end);
        for (std::size_t column = near; column < stop; ++column) {
          const std::size_t at = column / group * kRows;
          if (column % group == 0) {
            float errors[kRows];
            Search::search({task.levels, rest + column * kRows, task.weight + column, group, task.scale + at,
                            task.zero + at, errors});
          }
          round_column(task, column, rest);
          const std::size_t later = column + 1;
          add_outer(task.feedback + column * columns + later, 1, task.wanted + column * kRows, stop - later,
                    rest + later * kRows);
        }
        const Strided feedback{task.feedback + near * columns + stop, 1, columns};
        add_product(feedback, task.wanted + near * kRows, end - stop, stop - near, rest + stop * kRows);
      }
      if (task.rounded) {
        task.rounded->add_product(task.rounded->feedback + end * columns + begin, columns, task.wanted + begin * kRows,
                                  columns - end, end - begin, rest + end * kRows);
        continue;
      }
      const Strided feedback{task.feedback + begin * columns + end, 1, columns};
      add_product(feedback, task.wanted + begin * kRows, columns - end, end - begin, rest + end * kRows);
    }
  }

  // The code of a column from its adjusted values in `rest`; `wanted` becomes the rounding error of its own values.
  static MPO_INLINE void round_column(const RoundTask& task, std::size_t column, const float* rest) {
    const std::size_t at = column / task.group * kRows, here = column * kRows;
    const F top = Search::top_of(task.levels);
    for (std::size_t lane = 0; lane < kRows; lane += kLanes) {
      const F scale = X::load(task.scale + at + lane), zero = X::load(task.zero + at + lane);
      const F code = Search::code_of(X::load(rest + here + lane), Search::inverse(scale), zero, top);
      const F stored = X::multiply(scale, X::subtract(code, zero));
      X::store(task.codes + here + lane, code);
      X::store(task.wanted + here + lane, X::subtract(X::load(task.wanted + here + lane), stored));
    }
  }

  // -- descent

  struct Descent {
    const RoundTask& task;
    float* gradient;  // H (w - w^) [columns, kRows]
    float* change;    // [block, kRows]: by how much the residual of the block's columns changes
    float* basis;     // [block, kRows]
    float* pulled;    // [block, kRows]
    float* steps;     // [inner, kRows]

    MPO_INLINE Strided hessian(std::size_t row, std::size_t column) const {
      return {task.hessian + row * task.columns + column, task.columns, 1};
    }

    // gradient += H change, in the columns [begin, end) but [skip, stop), for a change of the columns [at, at + count)
    void spread(const float* moved, std::size_t at, std::size_t count, std::size_t begin, std::size_t end, std::size_t skip,
                std::size_t stop) const {
      add_product(hessian(begin, at), moved, skip - begin, count, gradient + begin * kRows);
      add_product(hessian(stop, at), moved, end - stop, count, gradient + stop * kRows);
    }

    // One pass: group by group, scale (and zero) are set to the best for the codes with all else fixed, then each code.
    void pass() const {
      for (std::size_t begin = 0, end; begin < task.columns; begin = end) {
        end = block_end(task, begin);
        std::memset(change, 0, (end - begin) * kRows * sizeof(float));
        for (std::size_t column = begin; column < end; column += task.group) {
          refit(column, begin, end);
          for (std::size_t near = column; near < column + task.group; near += inner_size(task))
            recode(near, std::min(near + inner_size(task), column + task.group), begin, end);
        }
        for (std::size_t i = begin * kRows; i < end * kRows; i += kLanes)
          X::store(task.wanted + i, X::add(X::load(task.wanted + i), X::load(change + i - begin * kRows)));
        spread_far(begin, end);
      }
    }

    // gradient += H change outside of the block [begin, end) that was changed.
    void spread_far(std::size_t begin, std::size_t end) const {
      if (!task.rounded) return spread(change, begin, end - begin, 0, task.columns, begin, end);
      const std::uint16_t* const columns = task.rounded->hessian + begin;
      task.rounded->add_product(columns, task.columns, change, begin, end - begin, gradient);
      task.rounded->add_product(columns + end * task.columns, task.columns, change, task.columns - end, end - begin,
                                gradient + end * kRows);
    }

    // Scale and zero of the group that begins at `column`, by least squares, in the rows where that lowers the error.
    void refit(std::size_t column, std::size_t begin, std::size_t end) const {
      const std::size_t group = task.group, at = column / group * kRows;
      float* const moved = change + (column - begin) * kRows;
      for (std::size_t lane = 0; lane < kRows; lane += kLanes) {
        const F zero = X::load(task.zero + at + lane);
        for (std::size_t j = 0; j < group; ++j)
          X::store(basis + j * kRows + lane, X::subtract(X::load(task.codes + (column + j) * kRows + lane), zero));
      }
      std::memset(pulled, 0, group * kRows * sizeof(float));
      add_product(hessian(column, column), basis, group, group, pulled);
      float total = 0;
      for (std::size_t j = 0; j < group; ++j) total += task.ones[column + j];
      for (std::size_t lane = 0; lane < kRows; lane += kLanes) refit_rows(column, at, total, lane, moved);
      spread(moved, column, group, begin, end, column, column + group);
    }

    // With d the change of the scale and e that of the offset, w^ changes by d basis + e, and H w^ by d pulled + e ones.
    MPO_INLINE void refit_rows(std::size_t column, std::size_t at, float total, std::size_t lane, float* moved) const {
      const std::size_t group = task.group;
      F square = X::zero(), along = X::zero(), mixed = X::zero(), shift = X::zero();
      for (std::size_t j = 0; j < group; ++j) {
        const F code = X::load(basis + j * kRows + lane), pull = X::load(gradient + (column + j) * kRows + lane);
        square = X::fma(code, X::load(pulled + j * kRows + lane), square);
        along = X::fma(code, pull, along);
        if (!task.levels.zeros) continue;
        mixed = X::fma(X::broadcast(task.ones[column + j]), code, mixed);
        shift = X::add(shift, pull);
      }
      const F scale = X::load(task.scale + at + lane), zero = X::load(task.zero + at + lane), none = X::zero();
      F fitted, middle = zero;
      const F whole = X::broadcast(total);
      if (task.levels.zeros) {
        const F determinant = X::subtract(X::multiply(square, whole), X::multiply(mixed, mixed));
        const F least = X::multiply(X::broadcast(kParallel), X::multiply(square, whole));
        const F step = X::subtract(X::multiply(along, whole), X::multiply(shift, mixed));
        const F move = X::subtract(X::multiply(square, shift), X::multiply(mixed, along));
        fitted = Search::half(X::add(scale, X::select_below(least, determinant, X::divide(step, determinant), none)));
        const F offset = X::select_below(least, determinant, X::divide(move, determinant), none);
        const F size = X::larger(fitted, X::subtract(none, fitted));
        middle = Search::half(X::subtract(zero, X::select_below(none, size, X::divide(offset, fitted), none)));
      } else {
        fitted = Search::half(X::add(scale, X::select_below(none, square, X::divide(along, square), none)));
      }
      F d = X::subtract(fitted, scale), e = X::multiply(fitted, X::subtract(zero, middle));
      // The gain is 2 (d along + e shift) - (d^2 square + 2 d e mixed + e^2 total).
      F cost = X::multiply(X::multiply(e, e), whole);
      cost = X::fma(X::multiply(d, d), square, X::fma(X::multiply(X::add(d, d), e), mixed, cost));
      const F benefit = X::fma(X::add(d, d), along, X::multiply(X::add(e, e), shift));
      d = X::select_below(cost, benefit, d, none);
      e = X::select_below(cost, benefit, e, none);
      X::store(task.scale + at + lane, X::select_below(cost, benefit, fitted, scale));
      X::store(task.zero + at + lane, X::select_below(cost, benefit, middle, zero));
      const F back = X::subtract(none, d), lift = X::subtract(none, e);
      for (std::size_t j = 0; j < group; ++j) {
        float* const slope = gradient + (column + j) * kRows + lane;
        const F pull = X::fma(lift, X::broadcast(task.ones[column + j]), X::load(slope));
        X::store(slope, X::fma(back, X::load(pulled + j * kRows + lane), pull));
        X::store(moved + j * kRows + lane, X::fma(back, X::load(basis + j * kRows + lane), lift));
      }
    }

    // The codes of the columns [near, stop) of one group, one after another.
    void recode(std::size_t near, std::size_t stop, std::size_t begin, std::size_t end) const {
      const std::size_t at = near / task.group * kRows;
      const F top = Search::top_of(task.levels);
      for (std::size_t column = near; column < stop; ++column) {
        float* const codes = task.codes + column * kRows;
        float* const step = steps + (column - near) * kRows;
        const F pull = X::broadcast(1.0f / task.hessian[column * task.columns + column]);
        for (std::size_t lane = 0; lane < kRows; lane += kLanes) {
          const F scale = X::load(task.scale + at + lane), zero = X::load(task.zero + at + lane);
          const F now = X::load(codes + lane), slope = X::load(gradient + column * kRows + lane);
          const F wish = X::fma(slope, pull, X::multiply(scale, X::subtract(now, zero)));
          const F best = Search::code_of(wish, Search::inverse(scale), zero, top);
          const F moved = X::multiply(scale, X::subtract(now, best));  // the residual's
          float* const change_at = change + (column - begin) * kRows + lane;
          X::store(codes + lane, best);
          X::store(step + lane, moved);
          X::store(change_at, X::add(X::load(change_at), moved));
        }
        add_outer(task.hessian + near * task.columns + column, task.columns, step, stop - near, gradient + near * kRows);
      }
      spread(steps, near, stop - near, begin, end, near, stop);
    }

    // The error of all rows: the sum of (w - w^) H (w - w^).
    double error() const {
      double total = 0;
      for (std::size_t column = 0; column < task.columns; ++column) {
        F sum = X::zero();
        for (std::size_t lane = 0; lane < kRows; lane += kLanes) {
          const std::size_t at = column * kRows + lane;
          sum = X::fma(X::load(task.wanted + at), X::load(gradient + at), sum);
        }
        total += static_cast<double>(X::total(sum));
      }
      return total;
    }
  };

  // Scale and zero of a group cannot be separated when its codes are nearly equal; the zero then stays.
  static constexpr float kParallel = 1e-6f;

  static void round(const RoundTask& task) {
    const std::size_t columns = task.columns, block = std::max(task.group, kFitBlock);
    float* const gradient = task.work;
    sweep(task, gradient);
    if (!task.passes) return;
    std::memset(gradient, 0, columns * kRows * sizeof(float));
    if (task.rounded)
      task.rounded->add_product(task.rounded->hessian, columns, task.wanted, columns, columns, gradient);
    else
      add_product({task.hessian, columns, 1}, task.wanted, columns, columns, gradient);
    float* const change = gradient + columns * kRows;
    const Descent descent{task, gradient, change, change + block * kRows, change + 2 * block * kRows,
                          change + 3 * block * kRows};
    double last = std::numeric_limits<double>::infinity();
    for (int pass = 0; pass < task.passes; ++pass) {
      descent.pass();
      const double error = descent.error();
      if (last - error <= static_cast<double>(task.tolerance) * error) break;
      last = error;
    }
  }
};

// The table of an instruction set.
template <class X>
constexpr Fits make_fits() {
  return {SearchBody<X>::search, SearchBody<X>::encode, RoundBody<X>::round, CellsBody<X>::write, CellsBody<X>::write_gradients};
}

}  // namespace
}  // namespace mpo
