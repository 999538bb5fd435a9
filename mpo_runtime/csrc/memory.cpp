#include "memory.hpp"

#include <new>

namespace mpo {
namespace {

constexpr std::align_val_t kCacheLine{64};

}  // namespace

Memory::~Memory() { ::operator delete(data_, kCacheLine); }

void* Memory::grow(std::size_t bytes) {
  if (bytes > size_) {
    ::operator delete(data_, kCacheLine);
    data_ = nullptr;
    size_ = 0;
    data_ = ::operator new(bytes, kCacheLine);
    size_ = bytes;
  }
  return data_;
}

float* scratch_floats(std::size_t count) {
  thread_local Memory memory;
  return memory.reserve<float>(count);
}

}  // namespace mpo
