// The KV cache in pages of 32 positions. A page holds the keys and the values of all blocks and heads for its positions,
// so that sequences of any length share one store, and equal beginnings of sequences share their pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory.hpp"
#include "ops/ops.hpp"

namespace mpo {

// Which pages are in use, and by whom, is the caller's knowledge. One thread at a time may use a store.
class Pages {
 public:
  // Throws std::invalid_argument for a size of 0 or an unknown type, std::bad_alloc for sizes beyond any memory.
  Pages(std::size_t blocks, std::size_t heads, std::size_t size, const std::string& type);
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::size_t blocks() const { return blocks_; }
  std::size_t heads() const { return heads_; }
  std::size_t size() const { return size_; }
  Type type() const { return type_; }
  std::size_t count() const { return pages_.size(); }
  // Bytes of a page; the system provides them as they are first written.
  std::size_t page_bytes() const { return page_bytes_; }

  // Makes pages until there are `count`; throws std::bad_alloc where memory does not suffice. Pages never move.
  void grow(std::size_t count);
  std::uint8_t* page(std::size_t index);  // throws std::invalid_argument for a page that does not exist
  void copy(std::size_t source, std::size_t target);

  // Writes the key and the value [size] of a position of a page; the caller checks all indices.
  void store(const Ops& ops, std::size_t block, std::size_t head, std::uint8_t* page, std::size_t position,
             const float* key, const float* value) const;
  // The keys and values of a block and head in the pages of a sequence.
  KvPlace place(std::size_t block, std::size_t head, const std::uint8_t* const* pages) const;

 private:
  // Of a block and head, the keys, then the values: first position in the page.
  std::size_t stretch(std::size_t block, std::size_t head, bool value) const {
    return ((block * heads_ + head) * 2 + value) * kPagePositions;
  }

  std::size_t blocks_, heads_, size_;
  Type type_;
  std::size_t scales_at_, page_bytes_;  // int8: the scales lie behind all codes
  std::vector<Memory> pages_;
};

// Rows of fewer tokens are generated text, in a call that does not say what they are.
constexpr std::size_t kFewTokens = 8;

// The new tokens of one sequence in a call.
struct Span {
  std::size_t row;    // of the cache
  std::size_t first;  // token of the call
  std::size_t count;
  std::size_t start;  // position of the first token
  bool few;           // generated tokens, one or some drafts; otherwise a part of a prompt
};

// What the tokens of a call attend to: rows with pages of their own, each as long as its sequence.
class Cache {
 public:
  // Empty rows of equal capacity, for calls with the same number of tokens in every row. Throws as Pages does.
  Cache(std::size_t blocks, std::size_t rows, std::size_t heads, std::size_t capacity, std::size_t size,
        const std::string& type);

  // Rows for one call of a single batch row that holds the tokens of all of them in order. The sizes are those of `tables`.
  struct Rows {
    std::vector<std::vector<std::size_t>> tables;  // the pages of each row
    std::vector<std::size_t> lengths, counts;      // positions that are held, new tokens
    std::vector<bool> few;
  };
  // Throws std::invalid_argument for sizes that differ, pages that do not exist or too few of them.
  Cache(std::shared_ptr<Pages> pages, const Rows& rows);

  const Pages& pages() const { return *pages_; }
  std::size_t rows() const { return rows_.size(); }
  std::size_t capacity() const { return capacity_; }  // of the longest row
  std::size_t bytes() const { return pages_->page_bytes() * pages_->count(); }
  const std::vector<std::size_t>& lengths() const { return lengths_; }

  // Adds new tokens to the length of each row; throws std::invalid_argument for another number of rows or past the capacity.
  void advance(const std::vector<std::size_t>& counts);
  void rewind(std::size_t length);

  // The new tokens of a call of `rows` times `count`; throws std::invalid_argument where the cache was made for others.
  std::vector<Span> spans(std::size_t rows, std::size_t count) const;
  std::uint8_t* const* table(std::size_t row) const { return rows_[row].data(); }

 private:
  std::shared_ptr<Pages> pages_;
  std::vector<std::vector<std::uint8_t*>> rows_;
  std::vector<std::size_t> lengths_, counts_;  // counts_ is empty where all rows get as many
  std::vector<bool> few_;
  std::size_t capacity_ = 0;
};

}  // namespace mpo
