// Memory that starts at a cache line and is kept for the next call.
#pragma once

#include <cstddef>

namespace mpo {

// Grows only; growing loses the content. Content is undefined until it is written.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Memory& operator=(Memory&&) = delete;
  ~Memory();

  // Room for `count` elements of type T. The next call may return the same memory.
  template <class T>
  T* reserve(std::size_t count) {
    return static_cast<T*>(grow(count * sizeof(T)));
  }

 private:
  void* grow(std::size_t bytes);

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Room for `count` floats that belongs to the calling thread; its next call may return the same memory.
float* scratch_floats(std::size_t count);

}  // namespace mpo
