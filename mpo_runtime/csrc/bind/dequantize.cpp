// Group-wise quantised weights back to float32, for the reference backend: planes, scales and zeros as numpy arrays.
//
// In a plane of p bits, element j of its group sits in byte (j * p) / 8 at bit (j * p) % 8 (SPEC.md, section 5).
#include "bind/bind.hpp"
#include "check.hpp"
#include "level.hpp"

namespace mpo {
namespace {

using Plane = Array<const std::uint8_t, 3>;
using Halves = Array<const std::uint16_t, 2>;

std::string shape_text(const std::vector<std::size_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <class Any>
void expect_shape(const std::string& name, const Any& array, const std::vector<std::size_t>& expected) {
  std::vector<std::size_t> shape;
  for (std::size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
  if (shape != expected)
    fail("dequantize: ", name, " has shape ", shape_text(shape), ", expected ", shape_text(expected));
}

void dequantize(const std::vector<Plane>& planes, int bits, const Halves& scale, const std::optional<Halves>& zero,
                const Array<float, 2>& out, const std::string& isa) {
  const Width& width = width_of("dequantize", bits);
  const auto low = static_cast<std::size_t>(width.low), high = static_cast<std::size_t>(width.high);
  const std::size_t count = high ? 2 : 1;
  expect(planes.size() == count, "dequantize: ", bits, " bits are ", count, " plane(s), got ", planes.size());
  const std::size_t rows = planes[0].shape(0), groups = planes[0].shape(1), group = planes[0].shape(2) * 8 / low;
  if (!is_group(group))
    fail("dequantize: plane 0 holds groups of ", group, " elements, expected ", group_names());
  expect_shape("plane 0", planes[0], {rows, groups, group * low / 8});
  if (high) expect_shape("plane 1", planes[1], {rows, groups, group * high / 8});
  expect_shape("scale", scale, {rows, groups});
  if (zero) expect_shape("zero", *zero, {rows, groups});
  expect_shape("out", out, {rows, groups * group});

  const QuantizedMatrix w{bits,         rows, groups * group, group, planes[0].data(), high ? planes[1].data() : nullptr,
                          scale.data(), zero ? zero->data() : nullptr};
  const Level& level = isa.empty() ? active_level() : level_named("dequantize", isa);
  const nb::gil_scoped_release release;
  level.dequantize(w, 0, rows * groups, out.data());
}

}  // namespace

void bind_dequantize(nb::module_& module) {
  // noconvert: a silent copy of a wrong dtype would hide a mistake, and a copied `out` would lose the result.
  module.def("dequantize", &dequantize, nb::arg("planes").noconvert(), nb::arg("bits"), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert().none(), nb::arg("out").noconvert(), nb::arg("isa") = "");
}

}  // namespace mpo
