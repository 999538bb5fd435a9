// Memory that a thread keeps for its next task.
#pragma once

#include <cstddef>

namespace mpo {

// At least `count` floats, aligned to a cache line, of undefined content; the thread's next call may give them again.
float* scratch_floats(std::size_t count);

}  // namespace mpo
