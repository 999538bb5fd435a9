#include "program/transform.hpp"

#include <cstring>

#include "check.hpp"
#include "level.hpp"

namespace mpo {

Transform::Transform(std::size_t count, std::size_t block, const std::vector<float>& matrices)
    : count_(count), block_(block), turned_(matrices.size()), plain_(matrices) {
  expect(count > 0 && block > 0 && matrices.size() == count * block * block, "transform: expected ", count, " matrices of ", block,
         " x ", block, ", found ", matrices.size(), " numbers");
  for (std::size_t c = 0; c < count; ++c)
    for (std::size_t i = 0; i < block; ++i)
      for (std::size_t j = 0; j < block; ++j)
        turned_[(c * block + j) * block + i] = matrices[(c * block + i) * block + j];
}

bool Transform::fits(std::size_t columns) const {
  return columns % block_ == 0 && (count_ == 1 || count_ == columns / block_);
}

void Transform::apply(const float* x, std::size_t begin, std::size_t end, float* y) const { multiply(turned_, x, begin, end, y); }

void Transform::apply_back(const float* w, std::size_t columns, float* y) const { multiply(plain_, w, 0, columns / block_, y); }

void Transform::multiply(const std::vector<float>& factors, const float* x, std::size_t begin, std::size_t end, float* y) const {
  const Ops& ops = *active_level().ops;
  std::memset(y + begin * block_, 0, (end - begin) * block_ * sizeof(float));
  const auto product = [&](std::size_t first, std::size_t rows, std::size_t matrix) {
    ops.add_product({rows, block_, block_, {x + first * block_, block_}, {factors.data() + matrix * block_ * block_, block_},
                     {y + first * block_, block_}});
  };
  if (count_ == 1) return product(begin, end - begin, 0);
  for (std::size_t b = begin; b < end; ++b) product(b, 1, b % count_);
}

}  // namespace mpo
