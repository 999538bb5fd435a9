#include "program/cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "check.hpp"

namespace mpo {
namespace {

Type checked_type(const std::string& name) {
  const std::optional<Type> type = type_named(name);
  expect(type.has_value(), "cache: expected a type of f32, f16, bf16 or int8, found '", name, "'");
  return *type;
}

std::size_t product(std::initializer_list<std::size_t> factors) {
  std::size_t total = 1;
  for (const std::size_t factor : factors) {
    expect(factor > 0, "cache: expected sizes of at least 1");
    if (total > std::numeric_limits<std::size_t>::max() / 8 / factor) throw std::bad_alloc();
    total *= factor;
  }
  return total;
}

void* zeros(std::size_t count, std::size_t size) {
  void* memory = std::calloc(count, size);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void Cache::Free::operator()(void* memory) const { std::free(memory); }

Cache::Cache(std::size_t blocks, std::size_t rows, std::size_t heads, std::size_t capacity, std::size_t size,
             const std::string& type)
    : blocks_(blocks), rows_(rows), heads_(heads), capacity_(capacity), size_(size), type_(checked_type(type)) {
  const std::size_t stretches = product({blocks, 2, rows, heads, capacity});
  lengths_.assign(rows, 0);
  data_.reset(static_cast<std::uint8_t*>(zeros(product({stretches, size}), element_size(type_))));
  if (type_ == Type::int8) scales_.reset(static_cast<float*>(zeros(stretches, sizeof(float))));
}

std::size_t Cache::bytes() const {
  const std::size_t positions = blocks_ * 2 * rows_ * heads_ * capacity_;
  return positions * (size_ * element_size(type_) + (type_ == Type::int8 ? sizeof(float) : 0));
}

void Cache::advance(const std::vector<std::size_t>& counts) {
  expect(counts.size() == rows_, "cache: expected counts of ", rows_, " rows, found ", counts.size());
  for (std::size_t row = 0; row < rows_; ++row)
    expect(counts[row] <= capacity_ - lengths_[row], "cache: row ", row, " holds ", lengths_[row], " of ", capacity_,
           " tokens, no room for ", counts[row]);
  for (std::size_t row = 0; row < rows_; ++row) lengths_[row] += counts[row];
}

void Cache::rewind(std::size_t length) {
  for (std::size_t& held : lengths_) held = std::min(held, length);
}

void Cache::store(const Ops& ops, std::size_t block, std::size_t row, std::size_t head, std::size_t position,
                  const float* key, const float* value) {
  for (const bool is_value : {false, true}) {
    const std::size_t at = stretch(block, row, head, is_value) + position;
    ops.store(is_value ? value : key, size_, type_, data_.get() + at * size_ * element_size(type_),
              scales_ ? scales_.get() + at : nullptr);
  }
}

KvPlace Cache::place(std::size_t block, std::size_t row, std::size_t head) const {
  const std::size_t keys = stretch(block, row, head, false), values = stretch(block, row, head, true);
  const std::size_t width = size_ * element_size(type_);
  return {type_,
          data_.get() + keys * width,
          data_.get() + values * width,
          scales_ ? scales_.get() + keys : nullptr,
          scales_ ? scales_.get() + values : nullptr,
          size_};
}

}  // namespace mpo
