#include "program/linear.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "check.hpp"
#include "level.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTileTokens = 32;        // rows of x whose int8 copy stays in the cache beside a chunk of weights
constexpr std::size_t kChunkBytes = 48 << 10;  // weights of a chunk: read from memory once, then met in the cache
constexpr std::size_t kSmallestChunk = 16;     // rows; a cache line of y
constexpr std::size_t kMiddleChunk = 8;
constexpr std::size_t kLanes = 12;             // generated tokens from which they go through panels of integers
constexpr std::size_t kLaneJob = 64;

std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

}  // namespace

Linear::Linear(std::string name_, std::size_t rows_, std::size_t columns_, std::vector<Matrix> matrices_,
               std::vector<Operator> operators_, std::vector<float> bias_, std::size_t hadamard_,
               std::shared_ptr<const Transform> transform_)
    : name(std::move(name_)),
      rows(rows_),
      columns(columns_),
      matrices(std::move(matrices_)),
      operators(std::move(operators_)),
      bias(std::move(bias_)),
      hadamard(hadamard_),
      transform(std::move(transform_)) {
  const auto expect_size = [&](const auto& term, const char* what) {
    expect(term.rows() == rows && term.columns() == columns, name, ": ", what, " is not [", rows, ", ", columns, "]");
  };
  expect(rows > 0 && columns > 0, name, ": expected at least one row and column");
  expect(!matrices.empty() || !operators.empty(), name, ": has no terms");
  for (const Matrix& matrix : matrices) {
    expect_size(matrix, "a matrix");
    row_bytes += matrix.row_bytes();
  }
  for (const Operator& term : operators) {
    expect_size(term, "an operator");
    row_bytes += term.row_bytes();
    if (!term.is_low_rank()) continue;
    row_step = std::max(row_step, term.first().column_step());  // powers of two: the largest is a multiple of the others
  }
  expect(hadamard == 0 || (hadamard >= 16 && (hadamard & (hadamard - 1)) == 0 && columns % hadamard == 0), name,
         ": hadamard: expected a power of two from 16 on that divides ", columns, ", found ", hadamard);
  expect(!transform || (hadamard == 0 && transform->fits(columns)), name, ": the transform of its input does not fit ", columns,
         " inputs and hadamard ", hadamard);
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
  if (hadamard) active_level().ops->hadamard(out, columns, hadamard, out);
  if (transform) {
    const std::vector<float> stored(out, out + columns);
    transform->apply_back(stored.data(), columns, out);
  }
}

Activations& Workspace::codes(std::size_t tile) {
  while (codes_.size() <= tile) codes_.push_back(std::make_unique<Activations>());
  return *codes_[tile];
}

PanelInput& Workspace::panels(std::size_t input, const PanelKernels& kernels) {
  for (Panels& panels : panels_)
    if (panels.input == input && panels.kernels == &kernels) return *panels.made;
  panels_.push_back({input, &kernels, std::make_unique<PanelInput>()});
  return *panels_.back().made;
}

namespace {

// A call of apply(). Tokens are taken in tiles of kTileTokens.
class Application {
 public:
  Application(const std::vector<Product>& products, const float* x, std::size_t tokens, Arithmetic arithmetic,
              Workspace& work, Pool& pool)
      : products_(products),
        x_{x, products[0].layer->columns},
        tokens_(tokens),
        exact_(arithmetic == Arithmetic::floats || arithmetic == Arithmetic::prompt_floats),
        prompt_(arithmetic == Arithmetic::prompt || arithmetic == Arithmetic::prompt_floats),
        panels_(!prompt_ ? nullptr : exact_ ? active_level().float_panels : active_level().panels),
        lanes_(arithmetic == Arithmetic::codes && tokens >= kLanes && tokens <= kSlabTokens ? active_level().panels : nullptr),
        work_(work),
        pool_(pool) {}

  void run() const {
    prepare_panels();
    if (!panels_) prepare_codes();
    compute_middles();
    compute_products();
    for (const Product& product : products_)
      for (const Operator& term : product.layer->operators)
        if (!term.is_low_rank() && !panels(term)) add_operator(term, product.y);
  }

 private:
  // Generated tokens one by one: how a sweep adds up depends on their number.
  void add_operator(const Operator& term, float* y) const {
    if (prompt_) return term.add(x_.data, tokens_, y, work_.state, pool_);
    for (std::size_t t = 0; t < tokens_; ++t) term.add(x_.row(t), 1, y + t * term.rows(), work_.state, pool_);
  }

  std::size_t tiles() const { return (tokens_ + kTileTokens - 1) / kTileTokens; }
  std::size_t tile_size(std::size_t tile) const { return std::min(kTileTokens, tokens_ - tile * kTileTokens); }
  bool in_floats(const Matrix& matrix) const { return exact_ || !matrix.is_integer(); }
  // The kernels whose panels a matrix goes through, or null: as it is stored, and turned (the first of a low-rank term).
  const PanelKernels* panels(const Matrix& matrix) const { return panels_ ? matrix.panels(*panels_) : nullptr; }
  const PanelKernels* turned_panels(const Matrix& first) const { return panels_ ? first.computed_panels(*panels_) : nullptr; }
  // The same for generated tokens, whose results are those of each of them alone.
  const PanelKernels* lanes(const Matrix& matrix) const {
    if (!lanes_ || !matrix.is_integer() || matrix.panel_codes().halves) return nullptr;
    const PanelKernels* kernels = matrix.panels(*lanes_);
    return kernels->add_lanes ? kernels : nullptr;
  }
  const PanelKernels* panels(const Operator& term) const { return panels_ ? term.panels(*panels_, tokens_) : nullptr; }

  void prepare_codes() const {
    unsigned planes = 0;
    for (const Product& product : products_) {
      for (const Matrix& matrix : product.layer->matrices) planes |= lanes(matrix) ? 0 : matrix.planes();
      for (const Operator& term : product.layer->operators) planes |= term.is_low_rank() ? term.second().planes() : 0;
    }
    if (!planes || exact_) return;
    work_.codes(tiles() - 1);
    pool_.run(tiles(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t tile = first; tile < last; ++tile)
        work_.codes(tile).prepare(x_.row(tile * kTileTokens), tile_size(tile), x_.stride, planes);
    });
  }

  void prepare_panels() const {
    std::vector<const PanelKernels*> done{nullptr};
    const auto prepare = [&](const PanelKernels* kernels) {
      if (std::find(done.begin(), done.end(), kernels) != done.end()) return;
      work_.panels(0, *kernels).prepare(*kernels, x_, tokens_, x_.stride, pool_);
      done.push_back(kernels);
    };
    for (const Product& product : products_) {
      for (const Matrix& matrix : product.layer->matrices) prepare(panels_ ? panels(matrix) : lanes(matrix));
      for (const Operator& term : product.layer->operators)
        prepare(term.is_low_rank() ? panels(term.second()) : panels(term));
    }
  }

  // Rows [begin, end) of a matrix times a tile of tokens, into y [tokens, stride].
  void multiply_tile(const Matrix& matrix, std::size_t tile, const Workspace::Job& job, Rows<float> y,
                     bool accumulate) const {
    const std::size_t start = tile * kTileTokens;
    const Task task{0, tile_size(tile), job.begin, job.end, y.from(start), accumulate};
    matrix.multiply(in_floats(matrix) ? nullptr : &work_.codes(tile), x_.from(start), task);
  }

  // An inner vector second x [tokens, chi] of a low-rank term, in work_.middle.
  struct Middle {
    const Operator* term;
    float* at;
  };

  // Those of all low-rank terms, one after the other.
  void compute_middles() const {
    std::vector<Middle> parts;
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
        const std::size_t chi = term.second().rows(), step = panels(term.second()) ? kPanelRows : kMiddleChunk;
        for (std::size_t begin = 0; begin < chi; begin += step)
          work_.jobs.push_back({parts.size(), begin, std::min(begin + step, chi)});
        parts.push_back({&term, at});
        at += chi * tokens_;
      }
    pool_.run(work_.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t j = first; j < last; ++j) {
        const Workspace::Job& job = work_.jobs[j];
        const Middle& part = parts[job.product];
        const Matrix& matrix = part.term->second();
        if (panels(matrix)) {
          multiply_panels(matrix, job, {part.at, matrix.rows()});
          continue;
        }
        for (std::size_t tile = 0; tile < tiles(); ++tile)
          multiply_tile(matrix, tile, job, {part.at, matrix.rows()}, false);
      }
    });
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const Matrix& first = parts[i].term->first();
      const PanelKernels* kernels = turned_panels(first);
      if (kernels) work_.panels(1 + i, *kernels).prepare(*kernels, {parts[i].at, first.rows()}, tokens_, first.rows(), pool_);
    }
  }

  // Rows [begin, end) of a matrix times all tokens, in panels, into y [tokens, stride].
  void multiply_panels(const Matrix& matrix, const Workspace::Job& job, Rows<float> y) const {
    for (std::size_t slab = 0; slab < slab_count(tokens_); ++slab) {
      PanelSums sums(job.end - job.begin, slab_tokens(tokens_, slab));
      add_matrix(matrix, slab, job, sums);
      sums.put({slab * kSlabTokens, slab_tokens(tokens_, slab), job.begin, job.end, y, false});
    }
  }

  void add_matrix(const Matrix& matrix, std::size_t slab, const Workspace::Job& job, PanelSums& sums) const {
    const PanelKernels& kernels = *panels(matrix);
    sums.add(work_.panels(0, kernels), slab, matrix.panel_codes(), [&](std::size_t row, std::size_t column, const PanelRows& to) {
      matrix.panel(kernels, job.begin + row, column, to);
    });
  }

  // Bias, matrices and low-rank terms of all layers, in jobs of rows.
  void compute_products() const {
    work_.jobs.clear();
    std::vector<MiddlePlace> middles(products_.size());
    MiddlePlace next{work_.middle.data(), 1};
    std::size_t left = 0, rows = 0;
    const std::size_t shares = 2 * static_cast<std::size_t>(pool_.threads());
    for (const Product& product : products_) {
      left += product.layer->rows * product.layer->row_bytes;
      rows += product.layer->rows;
    }
    std::size_t panel_job = panels_ ? panels_->job : 0;
    while (panel_job > 64 && rows < 2 * panel_job * shares) panel_job /= 2;
    for (std::size_t p = 0; p < products_.size(); ++p) {
      const Linear& layer = *products_[p].layer;
      const std::size_t row_bytes = std::max<std::size_t>(layer.row_bytes, 1);
      const std::size_t step = std::max(kSmallestChunk, layer.row_step);
      for (std::size_t begin = 0; begin < layer.rows;) {
        // A single row of x reads each weight once, so chunks are as long as can be: the memory is fast in long streams
        // only. They grow shorter toward the end, so that all threads end together.
        const std::size_t bytes = tokens_ > 1 ? kChunkBytes : std::max(kChunkBytes, left / shares);
        const std::size_t wanted = panels_ ? panel_job : lanes_ ? kLaneJob : std::max(kSmallestChunk, bytes / row_bytes);
        const std::size_t end = std::min(begin + round_up(wanted, step), layer.rows);
        work_.jobs.push_back({p, begin, end});
        left -= (end - begin) * layer.row_bytes;
        begin = end;
      }
      middles[p] = next;
      for (const Operator& term : layer.operators)
        if (term.is_low_rank()) next = {next.at + term.first().rows() * tokens_, next.input + 1};
    }
    pool_.run(work_.jobs.size(), 1, [&](std::size_t first, std::size_t last) {
      for (std::size_t j = first; j < last; ++j) {
        const Workspace::Job& job = work_.jobs[j];
        compute_rows(products_[job.product], middles[job.product], job);
      }
    });
  }

  // Where the inner vectors of a layer's low-rank terms begin: in memory, and among the inputs in panels.
  struct MiddlePlace {
    const float* at;
    std::size_t input;
  };

  // The rows of a job for all tokens.
  void compute_rows(const Product& product, const MiddlePlace& middle, const Workspace::Job& job) const {
    const Linear& layer = *product.layer;
    const Rows<float> y{product.y, layer.rows};
    const Task all{0, tokens_, job.begin, job.end, y, true};
    const bool fresh = only_panels(layer);
    for (std::size_t t = 0; t < tokens_ && !fresh; ++t) {
      float* to = y.row(t) + job.begin;
      if (layer.bias.empty()) std::memset(to, 0, (job.end - job.begin) * sizeof(float));
      else std::memcpy(to, layer.bias.data() + job.begin, (job.end - job.begin) * sizeof(float));
    }
    for (const Matrix& matrix : layer.matrices) {
      if (panels(matrix)) continue;
      if (const PanelKernels* kernels = lanes(matrix))
        multiply_lanes(work_.panels(0, *kernels), matrix.columns(), matrix.panel_codes(), all,
                       [&](std::size_t row, std::size_t column, const PanelRows& to) { matrix.panel(*kernels, row, column, to); });
      else if (prompt_ && in_floats(matrix)) matrix.add_batch(x_, all);
      else
        for (std::size_t tile = 0; tile < tiles(); ++tile) multiply_tile(matrix, tile, job, y, true);
    }
    const float* inner = middle.at;
    for (const Operator& term : layer.operators) {
      if (!term.is_low_rank()) continue;
      const std::size_t chi = term.first().rows();
      if (!turned_panels(term.first())) term.first().add_transposed({inner, chi}, all);
      inner += chi * tokens_;
    }
    if (panels_) add_panels(product, middle.input, job, !fresh);
  }

  // Whether nothing but products in panels belongs to a layer's result.
  bool only_panels(const Linear& layer) const {
    if (!panels_ || !layer.bias.empty()) return false;
    bool all = true, any = false;
    for (const Matrix& matrix : layer.matrices) (panels(matrix) ? any : all) = panels(matrix) != nullptr;
    for (const Operator& term : layer.operators) {
      const bool in_panels = (term.is_low_rank() ? turned_panels(term.first()) : panels(term)) != nullptr;
      (in_panels ? any : all) = in_panels;
    }
    return all && any;
  }

  // Computes the terms of a layer that are computed in panels, for the rows of a job.
  void add_panels(const Product& product, std::size_t input, const Workspace::Job& job, bool accumulate) const {
    const Linear& layer = *product.layer;
    const std::size_t rows = job.end - job.begin;
    std::vector<Built> built;  // terms whose rows are made here
    for (const Operator& term : layer.operators) {
      if (term.is_low_rank()) {
        if (const PanelKernels* kernels = turned_panels(term.first()))
          built.push_back(turned(term.first(), work_.panels(input, *kernels), job));
        ++input;
      } else if (const PanelKernels* kernels = panels(term)) {
        built.push_back({&work_.panels(0, *kernels), std::vector<float>(rows * layer.columns)});
        term.rows(job.begin, rows, built.back().rows.data());
      }
    }
    for (std::size_t slab = 0; slab < slab_count(tokens_); ++slab) {
      PanelSums sums(rows, slab_tokens(tokens_, slab));
      for (const Matrix& matrix : layer.matrices)
        if (panels(matrix)) add_matrix(matrix, slab, job, sums);
      for (const Built& term : built) {
        const std::size_t wide = term.x->columns();
        sums.add(*term.x, slab, {}, [&](std::size_t row, std::size_t column, const PanelRows& to) {
          term.x->kernels().round({term.rows.data() + row * wide + column, wide}, to);
        });
      }
      sums.put({slab * kSlabTokens, slab_tokens(tokens_, slab), job.begin, job.end, {product.y, layer.rows}, accumulate});
    }
  }

  // The rows of a job of a matrix that is not stored row by row, as float32 [rows, x->columns()].
  struct Built {
    const PanelInput* x;
    std::vector<float> rows;
  };

  static Built turned(const Matrix& first, const PanelInput& x, const Workspace::Job& job) {
    const std::size_t rows = job.end - job.begin, chi = first.rows();
    Built result{&x, std::vector<float>(rows * chi)};
    std::vector<float> part(rows);
    for (std::size_t k = 0; k < chi; ++k) {
      first.part(k, job.begin, rows, part.data());
      for (std::size_t r = 0; r < rows; ++r) result.rows[r * chi + k] = part[r];
    }
    return result;
  }

  const std::vector<Product>& products_;
  Rows<const float> x_;  // [tokens, columns]
  std::size_t tokens_;
  bool exact_, prompt_;
  const PanelSet *panels_, *lanes_;  // or null
  Workspace& work_;
  Pool& pool_;
};

}  // namespace

void apply(const std::vector<Product>& products, const float* x, std::size_t tokens, Arithmetic arithmetic,
           Workspace& work, Pool& pool) {
  Application(products, x, tokens, arithmetic, work, pool).run();
}

}  // namespace mpo
