#include "program/cache.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "check.hpp"

namespace mpo {
namespace {

constexpr std::size_t kLine = 64;

Type checked_type(const std::string& name) {
  const std::optional<Type> type = type_named(name);
  expect(type.has_value(), "cache: expected a type of f32, f16, bf16 or int8, found '", name, "'");
  return *type;
}

std::size_t product(std::initializer_list<std::size_t> factors) {
  std::size_t total = 1;
  for (const std::size_t factor : factors) {
    expect(factor > 0, "cache: expected sizes of at least 1");
    if (total > std::numeric_limits<std::size_t>::max() / 64 / factor) throw std::bad_alloc();
    total *= factor;
  }
  return total;
}

}  // namespace

Pages::Pages(std::size_t blocks, std::size_t heads, std::size_t size, const std::string& type)
    : blocks_(blocks), heads_(heads), size_(size), type_(checked_type(type)) {
  const std::size_t positions = product({blocks, heads, 2 * kPagePositions});
  scales_at_ = product({positions, size}) * element_size(type_);
  page_bytes_ = scales_at_;
  if (type_ == Type::int8) {
    scales_at_ = (scales_at_ + kLine - 1) / kLine * kLine;
    page_bytes_ = scales_at_ + positions * sizeof(float);
  }
}

void Pages::grow(std::size_t count) {
  product({std::max<std::size_t>(count, 1), page_bytes_});
  while (pages_.size() < count) {
    Memory page;
    page.reserve<std::uint8_t>(page_bytes_);
    pages_.push_back(std::move(page));
  }
}

std::uint8_t* Pages::page(std::size_t index) {
  expect(index < pages_.size(), "cache: there is no page ", index, ", the store has ", pages_.size());
  return pages_[index].reserve<std::uint8_t>(page_bytes_);
}

void Pages::copy(std::size_t source, std::size_t target) {
  if (source != target) std::memcpy(page(target), page(source), page_bytes_);
}

void Pages::store(const Ops& ops, std::size_t block, std::size_t head, std::uint8_t* page, std::size_t position,
                  const float* key, const float* value) const {
  for (const bool is_value : {false, true}) {
    const std::size_t at = stretch(block, head, is_value) + position;
    float* scale = type_ == Type::int8 ? reinterpret_cast<float*>(page + scales_at_) + at : nullptr;
    ops.store(is_value ? value : key, size_, type_, page + at * size_ * element_size(type_), scale);
  }
}

KvPlace Pages::place(std::size_t block, std::size_t head, const std::uint8_t* const* pages) const {
  const std::size_t keys = stretch(block, head, false), values = stretch(block, head, true);
  const std::size_t width = size_ * element_size(type_);
  const bool scaled = type_ == Type::int8;
  return {type_,
          pages,
          keys * width,
          values * width,
          scaled ? scales_at_ + keys * sizeof(float) : 0,
          scaled ? scales_at_ + values * sizeof(float) : 0,
          size_};
}

Cache::Cache(std::size_t blocks, std::size_t rows, std::size_t heads, std::size_t capacity, std::size_t size,
             const std::string& type)
    : pages_(std::make_shared<Pages>(blocks, heads, size, type)), capacity_(capacity) {
  product({rows, capacity});
  const std::size_t each = (capacity + kPagePositions - 1) / kPagePositions;
  product({rows, each, pages_->page_bytes()});
  pages_->grow(rows * each);
  lengths_.assign(rows, 0);
  rows_.resize(rows);
  for (std::size_t i = 0; i < rows * each; ++i) rows_[i / each].push_back(pages_->page(i));
}

Cache::Cache(std::shared_ptr<Pages> pages, const Rows& rows)
    : pages_(std::move(pages)), lengths_(rows.lengths), counts_(rows.counts), few_(rows.few) {
  const std::size_t count = rows.tables.size();
  expect(count > 0 && lengths_.size() == count && counts_.size() == count && few_.size() == count,
         "cache: expected as many lengths, counts and kinds as tables, and one at least");
  rows_.resize(count);
  for (std::size_t row = 0; row < count; ++row) {
    const std::vector<std::size_t>& table = rows.tables[row];
    const std::size_t room = table.size() * kPagePositions;
    expect(counts_[row] > 0 && lengths_[row] <= room && counts_[row] <= room - lengths_[row], "cache: row ", row,
           " has ", table.size(), " pages, which do not hold ", lengths_[row], " and ", counts_[row], " tokens");
    for (const std::size_t page : table) rows_[row].push_back(pages_->page(page));
    capacity_ = std::max(capacity_, room);
  }
}

void Cache::advance(const std::vector<std::size_t>& counts) {
  expect(counts.size() == rows(), "cache: expected counts of ", rows(), " rows, found ", counts.size());
  for (std::size_t row = 0; row < rows(); ++row)
    expect(counts[row] <= capacity_ - lengths_[row], "cache: row ", row, " holds ", lengths_[row], " of ", capacity_,
           " tokens, no room for ", counts[row]);
  for (std::size_t row = 0; row < rows(); ++row) lengths_[row] += counts[row];
}

void Cache::rewind(std::size_t length) {
  for (std::size_t& held : lengths_) held = std::min(held, length);
}

std::vector<Span> Cache::spans(std::size_t rows, std::size_t count) const {
  std::vector<Span> made;
  if (counts_.empty()) {
    expect(rows_.size() == rows, "program: a cache of ", rows_.size(), " rows for ", rows);
    for (std::size_t row = 0; row < rows; ++row)
      made.push_back({row, row * count, count, lengths_[row], count < kFewTokens});
    return made;
  }
  std::size_t first = 0;
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    made.push_back({row, first, counts_[row], lengths_[row], few_[row]});
    first += counts_[row];
  }
  expect(rows == 1 && first == count, "program: a cache for ", first, " tokens of one row, found ", rows, " of ", count);
  return made;
}

}  // namespace mpo
