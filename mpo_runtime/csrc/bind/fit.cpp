// Rounding matrices to integers, for the exporter: arrays of numpy in and out.
#include "bind/bind.hpp"
#include "check.hpp"
#include "fit/product.hpp"
#include "fit/rounding.hpp"

#include <nanobind/stl/tuple.h>

namespace mpo {
namespace {

using Values = Array<const float, 2>;
using Row = Array<const float, 1>;
using Codes = Array<std::uint8_t, 2>;
using HalvesOut = Array<std::uint16_t, 2>;
using GridOf = std::tuple<int, std::size_t, bool>;  // bits, group, zeros

void expect_size(std::size_t found, std::size_t wanted, const char* what) {
  expect(found == wanted, "fit: ", what, " has ", found, " entries, expected ", wanted);
}

FloatMatrix matrix_of(const Values& values) { return {values.shape(0), values.shape(1), values.data()}; }

FitGrid grid_of(const Values& values, const GridOf& given) {
  const auto& [bits, group, zeros] = given;
  width_of("fit", bits);
  expect(is_group(group) && values.shape(1) % group == 0, "fit: a group of ", group, " does not divide rows of ",
         values.shape(1), " columns");
  return {bits, group, zeros};
}

Search search_of(const std::vector<float>& factors, int turns) {
  expect(!factors.empty() && turns >= 0, "fit: expected at least one factor and no negative number of turns");
  return {factors, turns};
}

StoredIntegers stored(const Values& values, const FitGrid& grid, const Codes& codes, const HalvesOut& scale,
                      const HalvesOut& zero) {
  const std::size_t groups = values.shape(0) * (values.shape(1) / grid.group);
  expect_size(codes.size(), values.size(), "codes");
  expect_size(scale.size(), groups, "scale");
  expect_size(zero.size(), groups, "zero");
  return {codes.data(), scale.data(), zero.data()};
}

void nearest(const Values& values, const Row& weight, const GridOf& given, const std::vector<float>& factors, int turns,
             const Codes& codes, const HalvesOut& scale, const HalvesOut& zero) {
  const FitGrid grid = grid_of(values, given);
  expect_size(weight.size(), values.shape(1), "weight");
  const StoredIntegers out = stored(values, grid, codes, scale, zero);
  const Search search = search_of(factors, turns);
  const nb::gil_scoped_release release;
  round_to_nearest(matrix_of(values), weight.data(), grid, search, out);
}

void compensated(const Values& values, const Array<const std::int64_t, 1>& order, const Values& hessian,
                 const Values& feedback, const Row& weight, const GridOf& given, const std::vector<float>& factors,
                 int turns, int passes, float tolerance, bool fast, const Codes& codes, const HalvesOut& scale,
                 const HalvesOut& zero) {
  const FitGrid grid = grid_of(values, given);
  const std::size_t columns = values.shape(1);
  expect_size(order.size(), columns, "order");
  for (std::size_t j = 0; j < columns; ++j) {
    expect(order.data()[j] >= 0 && static_cast<std::size_t>(order.data()[j]) < columns, "fit: order names column ",
           order.data()[j], " of ", columns);
    const auto group_at = [&](std::size_t at) { return static_cast<std::size_t>(order.data()[at]) / grid.group; };
    expect(group_at(j) == group_at(j / grid.group * grid.group), "fit: order tears a group apart at ", j);
  }
  for (const Values* square : {&hessian, &feedback}) {
    expect_size(square->shape(0), columns, "a row of H or R");
    expect_size(square->shape(1), columns, "a column of H or R");
  }
  expect_size(weight.size(), columns, "weight");
  const StoredIntegers out = stored(values, grid, codes, scale, zero);
  const Search search = search_of(factors, turns);
  const Compensation compensation{order.data(), hessian.data(), feedback.data(), weight.data(), passes, tolerance, fast};
  const nb::gil_scoped_release release;
  round_compensated(matrix_of(values), grid, search, compensation, out);
}

void errors(const Values& values, const Row& weight, const std::vector<GridOf>& given, const std::vector<float>& factors,
            int turns, const Array<float, 2>& out) {
  std::vector<FitGrid> grids;
  for (const GridOf& one : given) grids.push_back(grid_of(values, one));
  expect_size(weight.size(), values.shape(1), "weight");
  expect_size(out.size(), grids.size() * values.shape(0), "out");
  const Search search = search_of(factors, turns);
  const nb::gil_scoped_release release;
  rounding_errors(matrix_of(values), weight.data(), grids, search, out.data());
}

void residual(const Values& values, const Row& weight, const GridOf& given, const std::vector<float>& factors, int turns,
              const Array<float, 2>& out) {
  const FitGrid grid = grid_of(values, given);
  expect_size(weight.size(), values.shape(1), "weight");
  expect_size(out.size(), values.size(), "out");
  const Search search = search_of(factors, turns);
  const nb::gil_scoped_release release;
  rounding_residual(matrix_of(values), weight.data(), grid, search, out.data());
}

// A matrix or its transpose.
StridedMatrix strided(const Values& values, bool turned) {
  const std::size_t width = values.shape(1);
  return turned ? StridedMatrix{values.data(), width, 1, width} : StridedMatrix{values.data(), values.shape(0), width, 1};
}

void product(const Values& left, bool left_turned, const Values& right, bool right_turned, const Array<float, 2>& out,
             bool add, bool upper) {
  const std::size_t count = left.shape(left_turned ? 0 : 1);
  const StridedMatrix a = strided(left, left_turned), b = strided(right, right_turned);
  expect(right.shape(right_turned ? 0 : 1) == count, "product: the right matrix has ", right.shape(right_turned ? 0 : 1),
         " columns, expected ", count);
  expect(out.shape(0) == a.rows && out.shape(1) == b.rows, "product: out is ", out.shape(0), " x ", out.shape(1),
         ", expected ", a.rows, " x ", b.rows);
  const nb::gil_scoped_release release;
  add_products(a, b, count, out.data(), add, upper);
}

Cells cells_of(const Values& latent, const Values& scale, const Values& zero, int top) {
  const std::size_t rows = latent.shape(0), columns = latent.shape(1), groups = scale.shape(1);
  const std::size_t group = groups ? columns / groups : 0;
  expect(group > 0 && group % 16 == 0 && group <= kLargestCell && group * groups == columns, "cells: ", groups,
         " groups do not divide rows of ", columns, " columns into groups of 16 to ", kLargestCell, " columns");
  expect(top > 0 && top < 256, "cells: the highest code is ", top, ", expected 1 to 255");
  expect_size(scale.shape(0), rows, "scale");
  expect_size(zero.shape(0), rows, "zero");
  expect_size(zero.shape(1), groups, "a row of zero");
  return {latent.data(), scale.data(), zero.data(), group, static_cast<float>(top)};
}

template <class Number>
void cells(const Values& latent, const Values& scale, const Values& zero, int top, const Array<Number, 2>& out) {
  const Cells given = cells_of(latent, scale, zero, top);
  expect_size(out.size(), latent.size(), "out");
  const nb::gil_scoped_release release;
  write_cells(given, scale.size(), sizeof(Number) == 4 ? Type::f32 : Type::bf16, out.data());
}

template <class Number>
void cell_gradients(const Values& latent, const Values& scale, const Values& zero, int top,
                    const Array<const Number, 2>& gradient, const Array<float, 2>& by_latent, const Array<float, 2>& by_scale,
                    const Array<float, 2>& by_zero) {
  const Cells given = cells_of(latent, scale, zero, top);
  expect_size(gradient.size(), latent.size(), "gradient");
  expect_size(by_latent.size(), latent.size(), "by_latent");
  expect_size(by_scale.size(), scale.size(), "by_scale");
  expect_size(by_zero.size(), scale.size(), "by_zero");
  const CellGradients out{by_latent.data(), by_scale.data(), by_zero.data()};
  const nb::gil_scoped_release release;
  write_cell_gradients(given, scale.size(), sizeof(Number) == 4 ? Type::f32 : Type::bf16, gradient.data(), out);
}

template <class Number>
void bind_cells(nb::module_& module) {
  module.def("cells", &cells<Number>, nb::arg("latent").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert(), nb::arg("top"), nb::arg("out").noconvert());
  module.def("cell_gradients", &cell_gradients<Number>, nb::arg("latent").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert(), nb::arg("top"), nb::arg("gradient").noconvert(), nb::arg("by_latent").noconvert(),
             nb::arg("by_scale").noconvert(), nb::arg("by_zero").noconvert());
}

}  // namespace

void bind_fit(nb::module_& module) {
  module.def("fit_nearest", &nearest, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grid"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("codes").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert());
  module.def("fit_compensated", &compensated, nb::arg("matrix").noconvert(), nb::arg("order").noconvert(),
             nb::arg("hessian").noconvert(), nb::arg("feedback").noconvert(), nb::arg("weight").noconvert(),
             nb::arg("grid"), nb::arg("factors"), nb::arg("turns"), nb::arg("passes"), nb::arg("tolerance"),
             nb::arg("fast"), nb::arg("codes").noconvert(), nb::arg("scale").noconvert(), nb::arg("zero").noconvert());
  module.def("fit_errors", &errors, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grids"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("out").noconvert());
  module.def("has_bf16_products", [] { return pair_kernels() != nullptr; });
  module.def("bf16_product", &product, nb::arg("left").noconvert(), nb::arg("left_turned"), nb::arg("right").noconvert(),
             nb::arg("right_turned"), nb::arg("out").noconvert(), nb::arg("add") = false, nb::arg("upper") = false);
  module.def("fit_residual", &residual, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grid"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("out").noconvert());
  bind_cells<float>(module);
  bind_cells<std::uint16_t>(module);
}

}  // namespace mpo
