// Rounding matrices to integers, for the exporter: arrays of numpy in and out.
#include "bind/bind.hpp"
#include "check.hpp"
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
                 int turns, int passes, float tolerance, const Codes& codes, const HalvesOut& scale,
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
  const Compensation compensation{order.data(), hessian.data(), feedback.data(), weight.data(), passes, tolerance};
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

}  // namespace

void bind_fit(nb::module_& module) {
  module.def("fit_nearest", &nearest, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grid"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("codes").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert());
  module.def("fit_compensated", &compensated, nb::arg("matrix").noconvert(), nb::arg("order").noconvert(),
             nb::arg("hessian").noconvert(), nb::arg("feedback").noconvert(), nb::arg("weight").noconvert(),
             nb::arg("grid"), nb::arg("factors"), nb::arg("turns"), nb::arg("passes"), nb::arg("tolerance"),
             nb::arg("codes").noconvert(), nb::arg("scale").noconvert(), nb::arg("zero").noconvert());
  module.def("fit_errors", &errors, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grids"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("out").noconvert());
  module.def("fit_residual", &residual, nb::arg("matrix").noconvert(), nb::arg("weight").noconvert(), nb::arg("grid"),
             nb::arg("factors"), nb::arg("turns"), nb::arg("out").noconvert());
}

}  // namespace mpo
