// How the product of cores is applied: by a sweep over the cores, or by building rows of the matrix. (The low-rank shape is
// multiplied like two matrices, see linear.cpp.)
//
// A sweep from the left holds a state [tokens * o_1 ... o_k, chi_k, i_(k+1) ... i_n]: finished outputs in front, inputs
// to come behind; from the right it is the mirror image. A core's block G[l, :, :, r], out x in, is one stored row.

#include "program/operator.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "check.hpp"
#include "level.hpp"
#include "memory.hpp"

namespace mpo {
namespace {

constexpr std::size_t kLargestState = 2u << 20;  // floats of a state: tokens are swept a slab at a time
constexpr std::size_t kTasksPerThread = 4;
constexpr std::size_t kFewestOutputs = 16;  // of a task; fewer results side by side do not fill vectors either
constexpr std::size_t kTileRows = 16, kTileColumns = 1024;  // of the matrix, where it is built

// How many outputs of a core one task computes: few enough that the `others` independent blocks of the core together give
// every thread several tasks.
std::size_t outputs_of_task(std::size_t out, std::size_t others, const Pool& pool) {
  const std::size_t wanted = kTasksPerThread * static_cast<std::size_t>(pool.threads());
  const std::size_t parts = (wanted + others - 1) / others;
  return std::min(out, std::max(kFewestOutputs, (out + parts - 1) / parts));
}

// a * b, or std::bad_alloc where no memory holds as much: cores of a few bytes can describe a matrix of any size.
std::size_t bounded(std::size_t a, std::size_t b) {
  constexpr std::size_t kMost = std::size_t{1} << 40;
  if (b && a > kMost / b) throw std::bad_alloc();
  return a * b;
}

struct Sizes {
  std::size_t bonds, out, inner, count, wide;  // for each bond value a block [out, inner], times [count, inner, wide]
  std::size_t step;                            // between the outputs o and o + 1 of the result
};

// For every bond value b: result[n, b, o, :] = sum over j of block_b[o, j] from[n, j, :]. blocks(b, begin, out, block,
// memory) gives the rows [begin, begin + out) of a block; place(b, n, o) says where a result begins. Where `wide` is small
// the state is turned first, to [inner, (count, wide)], so that vectors are full.
template <class Blocks, class Place>
void multiply_blocks(const Sizes& sizes, const float* from, float* to, float* spare, Blocks blocks, Place place,
                     Pool& pool) {
  const std::size_t inner = sizes.inner, count = sizes.count, wide = sizes.wide, all = count * wide;
  const std::size_t size = outputs_of_task(sizes.out, sizes.bonds, pool), parts = (sizes.out + size - 1) / size;
  const bool turn = wide < kFewestOutputs;
  const Ops& ops = *active_level().ops;
  if (turn)
    for (std::size_t n = 0; n < count; ++n)
      for (std::size_t j = 0; j < inner; ++j)
        for (std::size_t z = 0; z < wide; ++z) spare[j * all + n * wide + z] = from[(n * inner + j) * wide + z];
  pool.run(sizes.bonds * parts, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t task = first; task < last; ++task) {
      const std::size_t b = task / parts, begin = task % parts * size, out = std::min(size, sizes.out - begin);
      float* block = scratch_floats(2 * out * inner + (turn ? out * all : 0));
      float* sums = block + 2 * out * inner;
      blocks(b, begin, out, block, block + out * inner);
      if (turn) {
        std::memset(sums, 0, out * all * sizeof(float));
        ops.add_product({out, all, inner, {block, inner}, {spare, all}, {sums, all}});
        for (std::size_t o = 0; o < out; ++o)
          for (std::size_t n = 0; n < count; ++n)
            for (std::size_t z = 0; z < wide; ++z) to[place(b, n, begin + o) + z] = sums[o * all + n * wide + z];
        continue;
      }
      for (std::size_t n = 0; n < count; ++n) {
        float* at = to + place(b, n, begin);
        for (std::size_t o = 0; o < out; ++o) std::memset(at + o * sizes.step, 0, wide * sizeof(float));
        ops.add_product({out, wide, inner, {block, inner}, {from + n * inner * wide, wide}, {at, sizes.step}});
      }
    }
  });
}

}  // namespace

Operator::Operator(std::vector<Core> cores, bool reverse, std::size_t densify_from)
    : cores_(std::move(cores)), reverse_(reverse), densify_from_(densify_from) {
  expect(cores_.size() >= 2, "operator: expected at least 2 cores");
  std::size_t bond = 1;
  for (const Core& core : cores_) {
    const Matrix& matrix = core.matrix;
    const bool fits = core.left == bond && core.right > 0 && core.out > 0 && core.in > 0 &&
                      core.stored_left >= core.left && matrix.rows() % core.stored_left == 0 &&
                      matrix.rows() / core.stored_left >= core.right && matrix.columns() % core.in == 0 &&
                      matrix.columns() / core.in == core.out;
    expect(fits, "operator: a core does not fit its neighbour or its matrix");
    rows_ = bounded(rows_, core.out);
    columns_ = bounded(columns_, core.in);
    bond = core.right;
  }
  expect(bond == 1, "operator: the last bond is ", bond, ", expected 1");
  const Core &one = cores_[0], &two = cores_[1];
  low_rank_ = cores_.size() == 2 && one.in == 1 && two.out == 1;
  if (low_rank_) {
    first_ = one.matrix.first_rows(one.right);
    second_ = two.matrix.first_rows(two.left);
    return;
  }
  std::size_t done = 1, rest = columns_;
  largest_state_ = columns_;
  const std::size_t count = cores_.size();
  for (std::size_t k = 0; k < count; ++k) {
    const Core& core = cores_[reverse ? count - 1 - k : k];
    done *= core.out;
    rest /= core.in;
    largest_state_ = std::max(largest_state_, bounded(bounded(done, rest), reverse ? core.left : core.right));
  }
}

void Operator::add(const float* x, std::size_t tokens, float* y, std::vector<float>& state, Pool& pool) const {
  if (densify_from_ && tokens >= densify_from_) return add_dense(x, tokens, y, pool);
  const std::size_t slab = std::max<std::size_t>(1, std::min(tokens, kLargestState / largest_state_));
  if (state.size() < 3 * slab * largest_state_) state.resize(3 * slab * largest_state_);
  const std::size_t count = cores_.size();
  for (std::size_t start = 0; start < tokens; start += slab) {
    const std::size_t batch = std::min(slab, tokens - start);
    float *next = state.data(), *other = next + slab * largest_state_, *spare = other + slab * largest_state_;
    const float* from = x + start * columns_;
    std::size_t done = 1, rest = columns_;
    for (std::size_t k = 0; k < count; ++k) {
      const Core& core = cores_[reverse_ ? count - 1 - k : k];
      rest /= core.in;
      if (reverse_) step_back(core, batch * rest, done, from, next, spare, pool);
      else step(core, batch * done, rest, from, next, spare, pool);
      done *= core.out;
      from = next;
      std::swap(next, other);
    }
    active_level().ops->add_scaled(y + start * rows_, from, batch * rows_, 1.0f, y + start * rows_);
  }
}

// to [count, o, r, rest] = sum over l and i of G[l, o, i, r] from [count, l, i, rest]
void Operator::step(const Core& core, std::size_t count, std::size_t rest, const float* from, float* to, float* spare,
                    Pool& pool) const {
  const std::size_t in = core.in, right = core.right, inner = core.left * in;
  const auto blocks = [&](std::size_t r, std::size_t begin, std::size_t out, float* block, float* part) {
    for (std::size_t l = 0; l < core.left; ++l) {
      core.matrix.part(core.row(r, l), begin * in, out * in, part);
      for (std::size_t o = 0; o < out; ++o) std::memcpy(block + o * inner + l * in, part + o * in, in * sizeof(float));
    }
  };
  const auto place = [&](std::size_t r, std::size_t n, std::size_t o) { return ((n * core.out + o) * right + r) * rest; };
  multiply_blocks({right, core.out, inner, count, rest, right * rest}, from, to, spare, blocks, place, pool);
}

// to [count, l, o, done] = sum over i and r of G[l, o, i, r] from [count, i, r, done]
void Operator::step_back(const Core& core, std::size_t count, std::size_t done, const float* from, float* to,
                         float* spare, Pool& pool) const {
  const std::size_t in = core.in, left = core.left, right = core.right, inner = in * right;
  const auto blocks = [&](std::size_t l, std::size_t begin, std::size_t out, float* block, float* part) {
    for (std::size_t r = 0; r < right; ++r) {
      core.matrix.part(core.row(r, l), begin * in, out * in, part);
      for (std::size_t o = 0; o < out; ++o)
        for (std::size_t i = 0; i < in; ++i) block[o * inner + i * right + r] = part[o * in + i];
    }
  };
  const auto place = [&](std::size_t l, std::size_t n, std::size_t o) { return ((n * left + l) * core.out + o) * done; };
  multiply_blocks({left, core.out, inner, count, done, done}, from, to, spare, blocks, place, pool);
}

// Builds rows of the matrix. The digits of a row's number choose a slice of each core; the products of the leading slices
// are kept for the next row as long as their digits stay the same.
class Operator::RowBuilder {
 public:
  explicit RowBuilder(const Operator& of) : of_(of), states_(of.cores_.size() + 1), digits_(of.cores_.size()) {
    states_[0] = {1.0f};
  }

  const std::vector<float>& row(std::size_t r) {
    std::size_t after = of_.rows_, columns = 1;
    bool changed = fresh_;
    for (std::size_t k = 0; k < of_.cores_.size(); ++k) {
      const Core& core = of_.cores_[k];
      after /= core.out;
      const std::size_t digit = r / after % core.out;
      changed = changed || digit != digits_[k];
      if (changed) advance(core, k, digit, columns);
      digits_[k] = digit;
      columns *= core.in;
    }
    fresh_ = false;
    return states_.back();
  }

 private:
  // [columns, left] times G[:, digit, :, :] as [left, (in, right)]
  void advance(const Core& core, std::size_t k, std::size_t digit, std::size_t columns) {
    const std::size_t in = core.in, right = core.right, wide = in * right;
    slice_.resize(core.left * wide);
    part_.resize(in);
    for (std::size_t r = 0; r < right; ++r)
      for (std::size_t l = 0; l < core.left; ++l) {
        core.matrix.part(core.row(r, l), digit * in, in, part_.data());
        for (std::size_t i = 0; i < in; ++i) slice_[l * wide + i * right + r] = part_[i];
      }
    states_[k + 1].assign(columns * wide, 0.0f);
    active_level().ops->add_product({columns, wide, core.left, {states_[k].data(), core.left}, {slice_.data(), wide},
                                     {states_[k + 1].data(), wide}});
  }

  const Operator& of_;
  std::vector<std::vector<float>> states_;  // [i_1 ... i_k, chi_k]
  std::vector<std::size_t> digits_;
  std::vector<float> slice_, part_;
  bool fresh_ = true;
};

// For many tokens: the matrix is built a few rows at a time, each of them multiplied with all tokens.
void Operator::add_dense(const float* x, std::size_t tokens, float* y, Pool& pool) const {
  const Ops& ops = *active_level().ops;
  pool.run(rows_, kTileRows, [&](std::size_t begin, std::size_t end) {
    const std::size_t height = end - begin;
    std::vector<float> built(height * columns_), turned(kTileColumns * height);
    rows(begin, height, built.data());
    for (std::size_t c = 0; c < columns_; c += kTileColumns) {
      const std::size_t wide = std::min(kTileColumns, columns_ - c);
      for (std::size_t i = 0; i < height; ++i)
        for (std::size_t j = 0; j < wide; ++j) turned[j * height + i] = built[i * columns_ + c + j];
      ops.add_product({tokens, height, wide, {x + c, columns_}, {turned.data(), height}, {y + begin, rows_}});
    }
  });
}

const PanelKernels* Operator::panels(const PanelSet& set, std::size_t tokens) const {
  if (low_rank_ || !densify_from_ || tokens < densify_from_) return nullptr;
  const auto is_integer = [](const Core& core) { return core.matrix.is_integer(); };
  return std::all_of(cores_.begin(), cores_.end(), is_integer) ? set.computed : set.floats;
}

void Operator::rows(std::size_t r, std::size_t count, float* out) const {
  RowBuilder builder(*this);
  for (std::size_t i = 0; i < count; ++i) std::memcpy(out + i * columns_, builder.row(r + i).data(), columns_ * sizeof(float));
}

void Operator::add_row(std::size_t r, float* out) const {
  RowBuilder builder(*this);
  const std::vector<float>& row = builder.row(r);
  for (std::size_t c = 0; c < columns_; ++c) out[c] += row[c];
}

}  // namespace mpo
