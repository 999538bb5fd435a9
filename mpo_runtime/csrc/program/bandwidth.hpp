// How fast this machine reads memory in order: the ceiling that benchmarks compare kernels with.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpo {

// Bytes per second of summing `words` 64-bit words once with the pool's threads.
double read_bandwidth(const std::uint64_t* data, std::size_t words);

// Drops what the CPU's caches hold of so many words, where it has an instruction for that.
void evict(const std::uint64_t* data, std::size_t words);

}  // namespace mpo
