// Linear layers over the mapped file: y = sum of terms (x) + bias, terms being float or integer matrices or operators of
// cores (SPEC.md, sections 3 to 6).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/activations.hpp"
#include "program/matrix.hpp"
#include "program/operator.hpp"
#include "program/panels.hpp"
#include "program/pool.hpp"
#include "program/transform.hpp"

namespace mpo {

struct Linear {
  // Throws std::invalid_argument unless every term and the bias have the layer's size.
  Linear(std::string name, std::size_t rows, std::size_t columns, std::vector<Matrix> matrices,
         std::vector<Operator> operators, std::vector<float> bias, std::size_t hadamard,
         std::shared_ptr<const Transform> transform = nullptr);

  // Row r of the weight, in the basis of the inputs, as float32 [columns]; the bias is no part of it.
  void row(std::size_t r, float* out) const;

  std::string name;
  std::size_t rows, columns;
  std::vector<Matrix> matrices;
  std::vector<Operator> operators;
  std::vector<float> bias;
  std::size_t hadamard;  // the terms take the transform of every block of so many inputs; 0: the inputs as they are
  std::shared_ptr<const Transform> transform;  // a stored one in its place, or null
  std::size_t row_bytes = 0, row_step = 1;
};

// One of the layers that take the same input.
struct Product {
  const Linear* layer;
  float* y;  // [tokens, layer->rows]
};

// The memory of apply(), kept for the next call; one call at a time uses it.
class Workspace {
 public:
  Activations& codes(std::size_t tile);
  // Input 0 is x, then come the inner vectors of low-rank terms; each as the panels of some kernels need it.
  PanelInput& panels(std::size_t input, const PanelKernels& kernels);

  struct Job {
    std::size_t product, begin, end;
  };
  std::vector<Job> jobs;
  std::vector<float> middle;  // the low-rank terms' inner vectors
  std::vector<float> state;

 private:
  std::vector<std::unique_ptr<Activations>> codes_;
  struct Panels {
    std::size_t input;
    const PanelKernels* kernels;
    std::unique_ptr<PanelInput> made;
  };
  std::vector<Panels> panels_;
};

// What x is multiplied as. Floats: float32 throughout. Codes: int8 with integer weights. Both are for generated tokens, whose
// results are those of each of them alone, bit for bit where the level's kernels allow it. Parts of prompts are multiplied in
// panels, where the level has them: in float32, or rounded to what its panels hold.
enum class Arithmetic { floats, codes, prompt_floats, prompt };

// Computes all the products with x [tokens, columns], to which the layers' transforms were applied.
void apply(const std::vector<Product>& products, const float* x, std::size_t tokens, Arithmetic arithmetic, Workspace& work,
           Pool& pool);

}  // namespace mpo
