#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>


namespace mpo {
namespace {

constexpr std::size_t kTileTokens = 32;        // rows of x whose int8 copy stays in the cache beside a chunk of weights
constexpr std::size_t kChunkBytes = 48 << 10;  // weights of a chunk: read from memory once, then met in the cache
constexpr std::size_t kSmallestChunk = 16;     // rows; a cache line of y
constexpr std::size_t kMiddleChunk = 8;
constexpr std::size_t kBatch = 16;             // tokens from which float arithmetic goes through whole blocks of weights

std::size_t tiles_of(std::size_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }
std::size_t tile_size(std::size_t tile, std::size_t tokens) { return std::min(kTileTokens, tokens - tile * kTileTokens); }

void expect(bool good, const std::string& where, const std::string& message) {
  if (!good) throw std::invalid_argument(where + ": " + message);
}

std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

}  // namespace

Linear::Linear(std::string name_, std::size_t rows_, std::size_t columns_, std::vector<Matrix> matrices_,
               std::vector<Operator> operators_, std::vector<float> bias_)
    : name(std::move(name_)),
      rows(rows_),
      columns(columns_),
      matrices(std::move(matrices_)),
      operators(std::move(operators_)),
      bias(std::move(bias_)) {
  const std::string size = " is not [" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  expect(rows > 0 && columns > 0, name, "expected at least one row and column");
  expect(!matrices.empty() || !operators.empty(), name, "has no terms");
  for (const Matrix& matrix : matrices) {
    expect(matrix.rows() == rows && matrix.columns() == columns, name, "a matrix" + size);
    row_bytes += matrix.row_bytes();
    planes |= matrix.planes();
  }
  for (const Operator& term : operators) {
    expect(term.rows() == rows && term.columns() == columns, name, "an operator" + size);
    row_bytes += term.row_bytes();
    if (!term.is_low_rank()) continue;
    row_step = std::max(row_step, term.first().column_step());  // powers of two: the largest is a multiple of the others
    planes |= term.second().planes();
  }
  expect(bias.empty() || bias.size() == rows, name, "the bias has " + std::to_string(bias.size()) + " values, expected " +
                                                        std::to_string(rows));
}

void Linear::row(std::size_t r, float* out) const {
  std::memset(out, 0, columns * sizeof(float));
  if (!matrices.empty()) matrices[0].row(r, out);
  if (matrices.size() > 1) {
    std::vector<float> part(columns);
    for (std::size_t i = 1; i < matrices.size(); ++i) {
      matrices[i].row(r, part.data());
      for (std::size_t c = 0; c < columns; ++c) out[c] += part[c];
    }
  }
  for (const Operator& term : operators) term.add_row(r, out);
}

Activations& Workspace::codes(std::size_t tile) {
  while (codes_.size() <= tile) codes_.push_back(std::make_unique<Activations>());
  return *codes_[tile];
}

namespace {

// The inner vectors t = second x of all low-rank terms, one after the other in work.middle, each [tokens, chi].
void compute_middles(const std::vector<Product>& products, const float* x, std::size_t tokens, bool exact,
                     Workspace& work, Pool& pool) {
  struct Part {
    const Matrix* matrix;
    float* t;
  };
  std::vector<Part> parts;
  std::size_t total = 0;
  for (const Product& product : products)
    for (const Operator& term : product.layer->operators)
      if (term.is_low_rank()) total += term.second().rows() * tokens;
  if (total == 0) return;
  work.middle.resize(total);
  float* at = work.middle.data();
  work.jobs.clear();
  for (const Product& product : products)
    for (const Operator& term : product.layer->operators) {
      if (!term.is_low_rank()) continue;
      const std::size_t chi = term.second().rows();
      for (std::size_t begin = 0; begin < chi; begin += kMiddleChunk)
        work.jobs.push_back({parts.size(), begin, std::min(begin + kMiddleChunk, chi)});
      parts.push_back({&term.second(), at});
      at += chi * tokens;
    }
  pool.run(work.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t j = first; j < last; ++j) {
      const Workspace::Job& job = work.jobs[j];
      const Part& part = parts[job.product];
      const std::size_t chi = part.matrix->rows();
      for (std::size_t tile = 0; tile < tiles_of(tokens); ++tile) {
        const std::size_t start = tile * kTileTokens;
        const Activations* codes = exact || !part.matrix->is_integer() ? nullptr : &work.codes(tile);
        part.matrix->multiply(codes, x + start * part.matrix->columns(), tile_size(tile, tokens), job.begin, job.end,
                              part.t + start * chi, chi, false);
      }
    }
  });
}

// The rows of a job for a tile of tokens, from the matrices; of those in float arithmetic only where `batched` is false.
void compute_tile(const Product& product, const float* x, std::size_t tile, std::size_t tokens, const Workspace::Job& job,
                  bool exact, bool batched, Workspace& work) {
  const Linear& layer = *product.layer;
  const std::size_t start = tile * kTileTokens, batch = tile_size(tile, tokens);
  for (const Matrix& matrix : layer.matrices) {
    const bool floats = exact || !matrix.is_integer();
    if (floats && batched) continue;
    matrix.multiply(floats ? nullptr : &work.codes(tile), x + start * layer.columns, batch, job.begin, job.end,
                    product.y + start * layer.rows, layer.rows, true);
  }
}

// The rows of a job for all tokens: matrices, low-rank terms, bias.
void compute_rows(const Product& product, const float* middle, const float* x, std::size_t tokens,
                  const Workspace::Job& job, bool exact, Workspace& work) {
  const Linear& layer = *product.layer;
  const bool batched = tokens >= kBatch;
  for (std::size_t t = 0; t < tokens; ++t) {
    float* y = product.y + t * layer.rows;
    if (layer.bias.empty()) std::memset(y + job.begin, 0, (job.end - job.begin) * sizeof(float));
    else std::memcpy(y + job.begin, layer.bias.data() + job.begin, (job.end - job.begin) * sizeof(float));
  }
  for (std::size_t tile = 0; tile < tiles_of(tokens); ++tile)
    compute_tile(product, x, tile, tokens, job, exact, batched, work);
  for (const Matrix& matrix : layer.matrices)
    if (batched && (exact || !matrix.is_integer()))
      matrix.add_batch(x, tokens, job.begin, job.end, product.y, layer.rows);
  for (const Operator& term : layer.operators) {
    if (!term.is_low_rank()) continue;
    term.first().add_transposed(middle, tokens, job.begin, job.end, product.y, layer.rows);
    middle += term.first().rows() * tokens;
  }
}

}  // namespace

void apply(const std::vector<Product>& products, const float* x, std::size_t tokens, bool exact, Workspace& work,
           Pool& pool) {
  const std::size_t columns = products[0].layer->columns, tiles = tiles_of(tokens);
  unsigned planes = 0;
  for (const Product& product : products) planes |= product.layer->planes;
  if (planes && !exact) {
    work.codes(tiles - 1);
    pool.run(tiles, 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t tile = first; tile < last; ++tile)
        work.codes(tile).prepare(x + tile * kTileTokens * columns, tile_size(tile, tokens), columns, planes);
    });
  }
  compute_middles(products, x, tokens, exact, work, pool);
  work.jobs.clear();
  std::vector<std::size_t> middles(products.size());
  std::size_t offset = 0, left = 0;
  const std::size_t shares = 2 * static_cast<std::size_t>(pool.threads());
  for (const Product& product : products) left += product.layer->rows * product.layer->row_bytes;
  for (std::size_t p = 0; p < products.size(); ++p) {
    const Linear& layer = *products[p].layer;
    const std::size_t row_bytes = std::max<std::size_t>(layer.row_bytes, 1);
    const std::size_t step = std::max(kSmallestChunk, layer.row_step);
    for (std::size_t begin = 0; begin < layer.rows;) {
      // A single row of x reads each weight once, so chunks are as long as can be: the memory is fast in long streams
      // only. They grow shorter toward the end, so that all threads end together.
      const std::size_t bytes = tokens > 1 ? kChunkBytes : std::max(kChunkBytes, left / shares);
      const std::size_t end = std::min(begin + round_up(std::max(kSmallestChunk, bytes / row_bytes), step), layer.rows);
      work.jobs.push_back({p, begin, end});
      left -= (end - begin) * layer.row_bytes;
      begin = end;
    }
    middles[p] = offset;
    for (const Operator& term : layer.operators)
      if (term.is_low_rank()) offset += term.first().rows() * tokens;
  }
  pool.run(work.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t j = first; j < last; ++j) {
      const Workspace::Job& job = work.jobs[j];
      compute_rows(products[job.product], work.middle.data() + middles[job.product], x, tokens, job, exact, work);
    }
  });
  for (const Product& product : products)
    for (const Operator& term : product.layer->operators)
      if (!term.is_low_rank()) term.add(x, tokens, product.y, work.state, pool);
}

}  // namespace mpo
