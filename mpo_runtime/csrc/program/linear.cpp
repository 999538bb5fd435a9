#include "program/linear.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "check.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTileTokens = 32;        // rows of x whose int8 copy stays in the cache beside a chunk of weights
constexpr std::size_t kChunkBytes = 48 << 10;  // weights of a chunk: read from memory once, then met in the cache
constexpr std::size_t kSmallestChunk = 16;     // rows; a cache line of y
constexpr std::size_t kMiddleChunk = 8;
constexpr std::size_t kBatch = 16;             // tokens from which float arithmetic goes through whole blocks of weights

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
  const auto expect_size = [&](const auto& term, const char* what) {
    expect(term.rows() == rows && term.columns() == columns, name, ": ", what, " is not [", rows, ", ", columns, "]");
  };
  expect(rows > 0 && columns > 0, name, ": expected at least one row and column");
  expect(!matrices.empty() || !operators.empty(), name, ": has no terms");
  for (const Matrix& matrix : matrices) {
    expect_size(matrix, "a matrix");
    row_bytes += matrix.row_bytes();
    planes |= matrix.planes();
  }
  for (const Operator& term : operators) {
    expect_size(term, "an operator");
    row_bytes += term.row_bytes();
    if (!term.is_low_rank()) continue;
    row_step = std::max(row_step, term.first().column_step());  // powers of two: the largest is a multiple of the others
    planes |= term.second().planes();
  }
  expect(bias.empty() || bias.size() == rows, name, ": the bias has ", bias.size(), " values, expected ", rows);
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

// A call of apply(). Tokens are taken in tiles of kTileTokens.
class Application {
 public:
  Application(const std::vector<Product>& products, const float* x, std::size_t tokens, bool exact, Workspace& work,
              Pool& pool)
      : products_(products), x_{x, products[0].layer->columns}, tokens_(tokens), exact_(exact), work_(work), pool_(pool) {}

  void run() const {
    prepare_codes();
    compute_middles();
    compute_products();
    for (const Product& product : products_)
      for (const Operator& term : product.layer->operators)
        if (!term.is_low_rank()) term.add(x_.data, tokens_, product.y, work_.state, pool_);
  }

 private:
  std::size_t tiles() const { return (tokens_ + kTileTokens - 1) / kTileTokens; }
  std::size_t tile_size(std::size_t tile) const { return std::min(kTileTokens, tokens_ - tile * kTileTokens); }
  bool in_floats(const Matrix& matrix) const { return exact_ || !matrix.is_integer(); }

  void prepare_codes() const {
    unsigned planes = 0;
    for (const Product& product : products_) planes |= product.layer->planes;
    if (!planes || exact_) return;
    work_.codes(tiles() - 1);
    pool_.run(tiles(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t tile = first; tile < last; ++tile)
        work_.codes(tile).prepare(x_.row(tile * kTileTokens), tile_size(tile), x_.stride, planes);
    });
  }

  // Rows [begin, end) of a matrix times a tile of tokens, into y [tokens, stride].
  void multiply_tile(const Matrix& matrix, std::size_t tile, const Workspace::Job& job, Rows<float> y,
                     bool accumulate) const {
    const std::size_t start = tile * kTileTokens;
    const Task task{0, tile_size(tile), job.begin, job.end, y.from(start), accumulate};
    matrix.multiply(in_floats(matrix) ? nullptr : &work_.codes(tile), x_.from(start), task);
  }

  // The inner vectors second x of all low-rank terms, one after the other in work_.middle, each [tokens, chi].
  void compute_middles() const {
    struct Part {
      const Matrix* matrix;
      float* at;
    };
    std::vector<Part> parts;
    std::size_t total = 0;
    for (const Product& product : products_)
      for (const Operator& term : product.layer->operators)
        if (term.is_low_rank()) total += term.second().rows() * tokens_;
    if (total == 0) return;
    work_.middle.resize(total);
    float* at = work_.middle.data();
    work_.jobs.clear();
    for (const Product& product : products_)
      for (const Operator& term : product.layer->operators) {
        if (!term.is_low_rank()) continue;
        const std::size_t chi = term.second().rows();
        for (std::size_t begin = 0; begin < chi; begin += kMiddleChunk)
          work_.jobs.push_back({parts.size(), begin, std::min(begin + kMiddleChunk, chi)});
        parts.push_back({&term.second(), at});
        at += chi * tokens_;
      }
    pool_.run(work_.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t j = first; j < last; ++j) {
        const Workspace::Job& job = work_.jobs[j];
        const Part& part = parts[job.product];
        for (std::size_t tile = 0; tile < tiles(); ++tile)
          multiply_tile(*part.matrix, tile, job, {part.at, part.matrix->rows()}, false);
      }
    });
  }

  // Bias, matrices and low-rank terms of all layers, in jobs of rows.
  void compute_products() const {
    work_.jobs.clear();
    std::vector<std::size_t> middles(products_.size());
    std::size_t offset = 0, left = 0;
    const std::size_t shares = 2 * static_cast<std::size_t>(pool_.threads());
    for (const Product& product : products_) left += product.layer->rows * product.layer->row_bytes;
    for (std::size_t p = 0; p < products_.size(); ++p) {
      const Linear& layer = *products_[p].layer;
      const std::size_t row_bytes = std::max<std::size_t>(layer.row_bytes, 1);
      const std::size_t step = std::max(kSmallestChunk, layer.row_step);
      for (std::size_t begin = 0; begin < layer.rows;) {
        // A single row of x reads each weight once, so chunks are as long as can be: the memory is fast in long streams
        // only. They grow shorter toward the end, so that all threads end together.
        const std::size_t bytes = tokens_ > 1 ? kChunkBytes : std::max(kChunkBytes, left / shares);
        const std::size_t end = std::min(begin + round_up(std::max(kSmallestChunk, bytes / row_bytes), step), layer.rows);
        work_.jobs.push_back({p, begin, end});
        left -= (end - begin) * layer.row_bytes;
        begin = end;
      }
      middles[p] = offset;
      for (const Operator& term : layer.operators)
        if (term.is_low_rank()) offset += term.first().rows() * tokens_;
    }
    pool_.run(work_.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t j = first; j < last; ++j) {
        const Workspace::Job& job = work_.jobs[j];
        compute_rows(products_[job.product], work_.middle.data() + middles[job.product], job);
      }
    });
  }

  // The rows of a job for all tokens.
  void compute_rows(const Product& product, const float* middle, const Workspace::Job& job) const {
    const Linear& layer = *product.layer;
    const Rows<float> y{product.y, layer.rows};
    const Task all{0, tokens_, job.begin, job.end, y, true};
    const bool batched = tokens_ >= kBatch;
    for (std::size_t t = 0; t < tokens_; ++t) {
      float* to = y.row(t) + job.begin;
      if (layer.bias.empty()) std::memset(to, 0, (job.end - job.begin) * sizeof(float));
      else std::memcpy(to, layer.bias.data() + job.begin, (job.end - job.begin) * sizeof(float));
    }
    for (std::size_t tile = 0; tile < tiles(); ++tile)
      for (const Matrix& matrix : layer.matrices)
        if (!batched || !in_floats(matrix)) multiply_tile(matrix, tile, job, y, true);
    for (const Matrix& matrix : layer.matrices)
      if (batched && in_floats(matrix)) matrix.add_batch(x_, all);
    for (const Operator& term : layer.operators) {
      if (!term.is_low_rank()) continue;
      const std::size_t chi = term.first().rows();
      term.first().add_transposed({middle, chi}, all);
      middle += chi * tokens_;
    }
  }

  const std::vector<Product>& products_;
  Rows<const float> x_;  // [tokens, columns]
  std::size_t tokens_;
  bool exact_;
  Workspace& work_;
  Pool& pool_;
};

}  // namespace

void apply(const std::vector<Product>& products, const float* x, std::size_t tokens, bool exact, Workspace& work,
           Pool& pool) {
  Application(products, x, tokens, exact, work, pool).run();
}

}  // namespace mpo
