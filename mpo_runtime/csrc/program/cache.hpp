// The KV cache: for every block, row and key-value head an array of keys and one of values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/ops.hpp"

namespace mpo {

// Memory is taken from the system as positions are first written, since calloc gives untouched pages.
class Cache {
 public:
  // Throws std::invalid_argument for a size of 0 or an unknown type, std::bad_alloc where memory does not suffice.
  Cache(std::size_t blocks, std::size_t rows, std::size_t heads, std::size_t capacity, std::size_t size,
        const std::string& type);

  std::size_t blocks() const { return blocks_; }
  std::size_t rows() const { return rows_; }
  std::size_t heads() const { return heads_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t size() const { return size_; }
  std::size_t bytes() const;
  const std::vector<std::size_t>& lengths() const { return lengths_; }

  // Adds new tokens to the length of each row; throws std::invalid_argument for another number of rows or past the capacity.
  void advance(const std::vector<std::size_t>& counts);
  void rewind(std::size_t length);

  // Writes the key and the value [size] of a position; the caller checks all indices.
  void store(const Ops& ops, std::size_t block, std::size_t row, std::size_t head, std::size_t position, const float* key,
             const float* value);
  KvPlace place(std::size_t block, std::size_t row, std::size_t head) const;

 private:
  std::size_t stretch(std::size_t block, std::size_t row, std::size_t head, bool value) const {
    return (((block * 2 + value) * rows_ + row) * heads_ + head) * capacity_;
  }
  struct Free {
    void operator()(void* memory) const;
  };

  std::size_t blocks_, rows_, heads_, capacity_, size_;
  Type type_;
  std::vector<std::size_t> lengths_;
  std::unique_ptr<std::uint8_t, Free> data_;
  std::unique_ptr<float, Free> scales_;
};

}  // namespace mpo
