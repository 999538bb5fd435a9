#include "weights.hpp"

#include "check.hpp"

namespace mpo {
namespace {

// "8, 6 or 5"
template <class Range, class Value>
std::string listed(const Range& range, Value value) {
  std::string text;
  std::size_t left = std::size(range);
  for (const auto& item : range) {
    text += std::to_string(value(item));
    if (--left) text += left == 1 ? " or " : ", ";
  }
  return text;
}

}  // namespace

const Width& width_of(const char* where, int bits) {
  for (const Width& width : kWidths)
    if (width.bits == bits) return width;
  fail(where, ": bits is ", bits, ", expected ", listed(kWidths, [](const Width& width) { return width.bits; }));
}

bool is_group(std::size_t group) {
  for (const int size : kGroups)
    if (group == static_cast<std::size_t>(size)) return true;
  return false;
}

std::string group_names() {
  return listed(kGroups, [](int size) { return size; });
}

void expect_group(const char* where, std::size_t group) {
  if (!is_group(group)) fail(where, ": group is ", group, ", expected ", group_names());
}

void expect_float_type(const char* where, Type type) {
  expect(type != Type::int8, where, ": expected a matrix of f32, f16 or bf16, found int8");
}

std::optional<Type> type_named(const std::string& name) {
  if (name == "f32") return Type::f32;
  if (name == "f16") return Type::f16;
  if (name == "bf16") return Type::bf16;
  if (name == "int8") return Type::int8;
  return std::nullopt;
}

}  // namespace mpo
