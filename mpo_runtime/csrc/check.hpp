// Errors of the caller: std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace mpo {

template <class Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) text += std::to_string(part);
  else text += part;
}

// Throws std::invalid_argument with the parts joined; numbers are written in decimal.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::invalid_argument(text);
}

// Fails with these parts unless `good`; the text is put together only then.
template <class... Parts>
void expect(bool good, const Parts&... parts) {
  if (!good) fail(parts...);
}

}  // namespace mpo
