// A forward pass as a list of operations over registers: recorded once, then run by one call for each step. The program
// knows no architecture; the models in mpo_runtime/models record it through backends/native.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "program/cache.hpp"
#include "program/linear.hpp"

namespace mpo {

// All methods throw std::invalid_argument on what does not fit together.
class Program {
 public:
  explicit Program(bool exact);
  ~Program();

  // Each records an operation and returns the register that holds its result, [tokens, width] in float32.
  using Register = std::size_t;
  Register input(std::size_t width);
  Register embed(std::shared_ptr<const Linear> table, float multiplier);  // of the ids
  // Of each stretch of x that is as wide as the weight.
  Register rms_norm(Register x, std::vector<float> weight, float eps);
  Register layer_norm(Register x, std::vector<float> weight, std::vector<float> bias, float eps);
  // Adds row p of a table [positions, width of x] to the token at position p of the cache.
  Register add_positions(Register x, std::vector<float> table);
  // Layers with the same input are recorded one after the other, so that they are computed together; those that take the
  // same transform of it share that, too.
  Register linear(Register x, std::shared_ptr<const Linear> layer);
  // Rotates q by position and gives it back; appends the rotated k, and v, to block `block` of the cache. Heads have
  // twice as many elements as there are frequencies.
  Register rope_and_append(Register q, Register k, Register v, std::vector<float> frequencies, std::size_t block);
  // A token sees the `window` positions that end with its own; all where that is 0.
  Register attention(Register q, std::size_t head_size, std::size_t block, float scale, std::size_t window);
  Register gelu(Register x);
  Register swiglu(Register gate, Register up);
  Register add_scaled(Register x, Register y, float scale);
  Register divide(Register x, float divisor);
  // Ends the recording; the result is what run() gives.
  void finish(Register result);

  std::size_t width(Register x) const;

  struct Call {
    std::size_t rows, count;                // tokens = rows * count
    const std::int64_t* ids;                // [rows, count], or null
    std::vector<Rows<const float>> inputs;  // each [tokens, width]
    Cache* cache;                           // or null
    Rows<float> out;                        // [tokens, width of the result]
  };
  // Safe to call from several threads at once, each with a cache of its own.
  void run(const Call& call) const;

 private:
  enum class Kind { embed, positions, rms_norm, layer_norm, linear, hadamard, transform, rope, attention, gelu, swiglu, add_scaled, divide };
  struct Instruction {
    Kind kind;
    std::vector<Register> from, to;
    std::shared_ptr<const Transform> matrices;          // transform: what x is multiplied with
    std::vector<std::shared_ptr<const Linear>> layers;  // linear: all that are recorded in a row with the same input
    std::size_t vector = 0, bias = 0;                   // indices into vectors_
    std::size_t block = 0, size = 0, window = 0;        // the cache's block; the size of a head or a transform; attention's window
    float value = 0;
  };
  struct State;  // the memory of one call

  Register transformed(Register x, const Linear& layer);
  Register made(Kind kind, std::vector<Register> from, std::size_t width);
  void expect_open() const;
  std::size_t keep(std::vector<float> values);
  void assign_slots();
  void check(const Call& call) const;
  std::unique_ptr<State> take() const;
  void execute(const Instruction& step, const Call& call, State& state) const;
  struct TokenRange {
    std::size_t begin, end;
  };
  void multiply(const Instruction& step, TokenRange range, Arithmetic arithmetic, State& state) const;
  void rope(const Instruction& step, const Call& call, State& state) const;
  void attend(const Instruction& step, const Call& call, State& state) const;

  bool exact_, finished_ = false;
  Register result_ = 0;
  std::vector<std::size_t> widths_;
  std::vector<Register> inputs_;
  std::vector<Instruction> steps_;
  std::vector<std::vector<float>> vectors_;
  std::vector<std::size_t> slots_, slot_widths_;  // registers that are never needed at once share a slot
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<State>> idle_;
};

}  // namespace mpo
