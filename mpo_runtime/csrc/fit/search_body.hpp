// The search of a group's scale and zero, written once over the vectors X of an instruction set. Included after the target is
// set (see target.hpp).
#pragma once

#include "fit/fit.hpp"

namespace mpo {
namespace {

template <class X>
struct SearchBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;
  static constexpr float kLargestHalf = 65504.0f;
  // Grids that are tried in one pass over a group.
  static constexpr int kTogether = 2;

  struct Grid {
    F scale, zero;
  };

  static MPO_INLINE F half(F x) {  // rounded to half precision, clipped to its range
    std::uint8_t bits[2 * kLanes];
    X::store_halves(bits, X::larger(X::smaller(x, X::broadcast(kLargestHalf)), X::broadcast(-kLargestHalf)));
    return X::load_halves(bits);
  }
  static MPO_INLINE F inverse(F scale) {  // 0 where the scale is 0: all codes of the group become its zero
    const F size = X::larger(scale, X::subtract(X::zero(), scale));
    return X::select_below(X::zero(), size, X::divide(X::broadcast(1.0f), scale), X::zero());
  }
  static MPO_INLINE F code_of(F value, F inverse_scale, F zero, F top) {
    return X::round(X::larger(X::smaller(X::fma(value, inverse_scale, zero), top), X::zero()));
  }
  static MPO_INLINE F top_of(const Levels& levels) {
    return X::broadcast(static_cast<float>((1 << levels.bits) - 1));
  }

  // The weighted squared errors of `Count` grids.
  template <int Count>
  static MPO_INLINE void errors(const SearchTask& task, std::size_t lane, const Grid* grids, F* error) {
    const F top = top_of(task.levels);
    F inverses[Count], steps[Count];
    for (int k = 0; k < Count; ++k) {
      inverses[k] = inverse(grids[k].scale);
      steps[k] = X::subtract(X::zero(), grids[k].scale);
      error[k] = X::zero();
    }
    for (std::size_t j = 0; j < task.count; ++j) {
      const F value = X::load(task.values + j * kFitRows + lane), weight = X::broadcast(task.weight[j]);
      for (int k = 0; k < Count; ++k) {
        const F code = code_of(value, inverses[k], grids[k].zero, top);
        const F rest = X::fma(steps[k], X::subtract(code, grids[k].zero), value);
        error[k] = X::fma(X::multiply(rest, rest), weight, error[k]);
      }
    }
  }

  // Scale and zero of least squares for the codes of a grid.
  static MPO_INLINE Grid least_squares(const SearchTask& task, std::size_t lane, const Grid& grid) {
    const F top = top_of(task.levels), inverse_scale = inverse(grid.scale);
    const auto value_of = [&](std::size_t j) { return X::load(task.values + j * kFitRows + lane); };
    const auto code_at = [&](F value) { return code_of(value, inverse_scale, grid.zero, top); };
    F square = X::zero(), product = X::zero();
    if (!task.levels.zeros) {
      for (std::size_t j = 0; j < task.count; ++j) {
        const F value = value_of(j), code = X::subtract(code_at(value), grid.zero);
        const F weighted = X::multiply(code, X::broadcast(task.weight[j]));
        square = X::fma(weighted, code, square);
        product = X::fma(weighted, value, product);
      }
      return {X::select_below(X::zero(), square, X::divide(product, square), grid.scale), grid.zero};
    }
    float total = 0;
    F code_sum = X::zero(), value_sum = X::zero();
    for (std::size_t j = 0; j < task.count; ++j) {
      const F value = value_of(j), weight = X::broadcast(task.weight[j]);
      total += task.weight[j];
      code_sum = X::fma(code_at(value), weight, code_sum);
      value_sum = X::fma(value, weight, value_sum);
    }
    const F whole = X::broadcast(total), mean_code = X::divide(code_sum, whole), mean = X::divide(value_sum, whole);
    for (std::size_t j = 0; j < task.count; ++j) {
      const F value = value_of(j), code = X::subtract(code_at(value), mean_code);
      const F weighted = X::multiply(code, X::broadcast(task.weight[j]));
      square = X::fma(weighted, code, square);
      product = X::fma(weighted, X::subtract(value, mean), product);
    }
    const F step = X::select_below(X::zero(), square, X::divide(product, square), grid.scale);
    const F size = X::larger(step, X::subtract(X::zero(), step));
    const F middle = X::subtract(mean_code, X::divide(mean, step));
    return {step, X::select_below(X::zero(), size, middle, grid.zero)};
  }

  // The grid whose range is that of the group times a factor.
  static MPO_INLINE Grid start(const Levels& levels, F low, F high, float factor) {
    const float top = static_cast<float>((1 << levels.bits) - 1), middle = implicit_zero(levels.bits);
    if (!levels.zeros) {  // code 0 stands for the value of largest magnitude
      const F opposite = X::subtract(X::zero(), low);
      const F extreme = X::select_below(opposite, high, X::subtract(X::zero(), high), opposite);
      return {half(X::divide(X::multiply(extreme, X::broadcast(factor)), X::broadcast(middle))), X::broadcast(middle)};
    }
    const F range = X::multiply(X::subtract(high, low), X::broadcast(factor));
    const F step = half(X::divide(range, X::broadcast(top)));
    const F centre = X::multiply(X::add(low, high), X::broadcast(0.5f));
    const F shift = X::select_below(X::zero(), step, X::divide(centre, step), X::zero());
    return {step, half(X::subtract(X::broadcast(top * 0.5f), shift))};
  }

  template <int Count>
  static MPO_INLINE void compare(const SearchTask& task, std::size_t lane, const Grid* grids, Grid& best, F& least) {
    F error[Count];
    errors<Count>(task, lane, grids, error);
    for (int k = 0; k < Count; ++k) {
      best.scale = X::select_below(error[k], least, grids[k].scale, best.scale);
      best.zero = X::select_below(error[k], least, grids[k].zero, best.zero);
      least = X::select_below(error[k], least, error[k], least);
    }
  }

  static void search(const SearchTask& task) {
    for (std::size_t lane = 0; lane < kFitRows; lane += kLanes) {
      F low = X::load(task.values + lane), high = low;
      for (std::size_t j = 1; j < task.count; ++j) {
        const F value = X::load(task.values + j * kFitRows + lane);
        low = X::smaller(low, value);
        high = X::larger(high, value);
      }
      const Levels& levels = task.levels;
      Grid best{X::zero(), X::broadcast(implicit_zero(levels.bits))};
      F least = X::broadcast(std::numeric_limits<float>::infinity());
      std::size_t number = 0;
      for (; number + kTogether <= levels.factor_count; number += kTogether) {
        Grid grids[kTogether];
        for (int k = 0; k < kTogether; ++k) grids[k] = start(levels, low, high, levels.factors[number + static_cast<std::size_t>(k)]);
        compare<kTogether>(task, lane, grids, best, least);
      }
      for (; number < levels.factor_count; ++number) {
        const Grid grid = start(levels, low, high, levels.factors[number]);
        compare<1>(task, lane, &grid, best, least);
      }
      for (int turn = 0; turn < levels.turns; ++turn) {
        Grid grid = least_squares(task, lane, best);
        grid = {half(grid.scale), half(grid.zero)};
        compare<1>(task, lane, &grid, best, least);
      }
      X::store(task.scale + lane, best.scale);
      X::store(task.zero + lane, best.zero);
      X::store(task.error + lane, least);
    }
  }

  static void encode(const Levels& levels, const float* values, std::size_t count, const float* scale,
                     const float* zero, float* codes) {
    const F top = top_of(levels);
    for (std::size_t lane = 0; lane < kFitRows; lane += kLanes) {
      const F inverse_scale = inverse(X::load(scale + lane)), middle = X::load(zero + lane);
      for (std::size_t j = 0; j < count; ++j)
        X::store(codes + j * kFitRows + lane,
                 code_of(X::load(values + j * kFitRows + lane), inverse_scale, middle, top));
    }
  }
};

}  // namespace
}  // namespace mpo
