#include "program/program.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "check.hpp"
#include "program/program_state.hpp"

namespace mpo {
namespace {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
constexpr std::size_t kMostKept = 1024;  // tokens of a call whose memory is kept for the next one

}  // namespace

Program::Program(bool exact) : exact_(exact) {}
Program::~Program() = default;

void Program::expect_open() const { expect(!finished_, "program: is finished, nothing can be added"); }

std::size_t Program::width(Register x) const {
  expect(x < widths_.size(), "program: there is no register ", x);
  return widths_[x];
}

std::size_t Program::keep(std::vector<float> values) {
  for (std::size_t i = 0; i < vectors_.size(); ++i)
    if (vectors_[i] == values) return i;  // the frequencies of all blocks are the same
  vectors_.push_back(std::move(values));
  return vectors_.size() - 1;
}

Program::Register Program::made(Kind kind, std::vector<Register> from, std::size_t width) {
  expect_open();
  Instruction step{};
  step.kind = kind;
  step.from = std::move(from);
  step.to = {widths_.size()};
  steps_.push_back(std::move(step));
  widths_.push_back(width);
  return widths_.size() - 1;
}

Program::Register Program::input(std::size_t width) {
  expect_open();
  expect(width > 0, "program: expected an input of at least one element");
  inputs_.push_back(widths_.size());
  widths_.push_back(width);
  return inputs_.back();
}

Program::Register Program::embed(std::shared_ptr<const Linear> table, float multiplier) {
  const Register to = made(Kind::embed, {}, table->columns);
  steps_.back().layers = {std::move(table)};
  steps_.back().value = multiplier;
  return to;
}

Program::Register Program::rms_norm(Register x, std::vector<float> weight, float eps) {
  const std::size_t size = weight.size();
  expect(size > 0 && width(x) % size == 0, "program: rms_norm: a weight of ", size, " for ", width(x), " elements");
  const Register to = made(Kind::rms_norm, {x}, width(x));
  steps_.back().vector = keep(std::move(weight));
  steps_.back().size = size;
  steps_.back().value = eps;
  return to;
}

Program::Register Program::layer_norm(Register x, std::vector<float> weight, std::vector<float> bias, float eps) {
  expect(weight.size() == width(x) && bias.size() == width(x), "program: layer_norm: a weight of ", weight.size(),
         " and a bias of ", bias.size(), " for ", width(x), " elements");
  const Register to = made(Kind::layer_norm, {x}, width(x));
  steps_.back().vector = keep(std::move(weight));
  steps_.back().bias = keep(std::move(bias));
  steps_.back().value = eps;
  return to;
}

Program::Register Program::add_positions(Register x, std::vector<float> table) {
  expect(!table.empty() && table.size() % width(x) == 0, "program: add_positions: a table of ", table.size(), " for ",
         width(x), " elements");
  const Register to = made(Kind::positions, {x}, width(x));
  steps_.back().vector = keep(std::move(table));
  return to;
}

Program::Register Program::linear(Register x, std::shared_ptr<const Linear> layer) {
  expect(layer->columns == width(x), "program: ", layer->name, " takes ", layer->columns, " inputs, found ", width(x));
  expect_open();
  if (layer->hadamard || layer->transform) x = transformed(x, *layer);
  if (!steps_.empty() && steps_.back().kind == Kind::linear && steps_.back().from[0] == x) {
    steps_.back().to.push_back(widths_.size());
    steps_.back().layers.push_back(layer);
    widths_.push_back(layer->rows);
    return widths_.size() - 1;
  }
  const Register to = made(Kind::linear, {x}, layer->rows);
  steps_.back().layers = {std::move(layer)};
  return to;
}

Program::Register Program::transformed(Register x, const Linear& layer) {
  const Kind kind = layer.transform ? Kind::transform : Kind::hadamard;
  for (const Instruction& step : steps_)
    if (step.kind == kind && step.from[0] == x && step.size == layer.hadamard && step.matrices == layer.transform)
      return step.to[0];
  const Register to = made(kind, {x}, width(x));
  steps_.back().size = layer.hadamard;
  steps_.back().matrices = layer.transform;
  return to;
}

Program::Register Program::rope_and_append(Register q, Register k, Register v, std::vector<float> frequencies,
                                           std::size_t block) {
  const std::size_t size = 2 * frequencies.size();
  expect(size > 0 && width(q) % size == 0 && width(k) % size == 0 && width(k) == width(v),
         "program: rope_and_append: heads of ", size, " do not fit widths ", width(q), ", ", width(k), ", ", width(v));
  const Register to = made(Kind::rope, {q, k, v}, width(q));
  steps_.back().vector = keep(std::move(frequencies));
  steps_.back().block = block;
  steps_.back().size = size;
  return to;
}

Program::Register Program::attention(Register q, std::size_t head_size, std::size_t block, float scale,
                                     std::size_t window) {
  expect(head_size > 0 && width(q) % head_size == 0, "program: attention: heads of ", head_size,
         " do not fit a width of ", width(q));
  const Register to = made(Kind::attention, {q}, width(q));
  steps_.back().block = block;
  steps_.back().size = head_size;
  steps_.back().value = scale;
  steps_.back().window = window;
  return to;
}

Program::Register Program::gelu(Register x) { return made(Kind::gelu, {x}, width(x)); }

Program::Register Program::swiglu(Register gate, Register up) {
  expect(width(gate) == width(up), "program: swiglu: widths differ");
  return made(Kind::swiglu, {gate, up}, width(gate));
}

Program::Register Program::add_scaled(Register x, Register y, float scale) {
  expect(width(x) == width(y), "program: add_scaled: widths differ");
  const Register to = made(Kind::add_scaled, {x, y}, width(x));
  steps_.back().value = scale;
  return to;
}

Program::Register Program::divide(Register x, float divisor) {
  const Register to = made(Kind::divide, {x}, width(x));
  steps_.back().value = divisor;
  return to;
}

void Program::finish(Register result) {
  expect_open();
  expect(result < widths_.size(), "program: there is no register ", result);
  expect(!steps_.empty() && std::find(inputs_.begin(), inputs_.end(), result) == inputs_.end(),
         "program: the result is an input");
  result_ = result;
  assign_slots();
  finished_ = true;
}

// Gives each register but inputs and result a slot, which is free again after the last step that reads it.
void Program::assign_slots() {
  std::vector<std::size_t> last(widths_.size(), 0);
  for (std::size_t s = 0; s < steps_.size(); ++s)
    for (const Register x : steps_[s].from) last[x] = s;
  slots_.assign(widths_.size(), kNone);
  std::vector<std::size_t> busy_until;
  for (std::size_t s = 0; s < steps_.size(); ++s)
    for (const Register x : steps_[s].to) {
      if (x == result_) continue;
      std::size_t slot = 0;
      while (slot < busy_until.size() && busy_until[slot] >= s) ++slot;
      if (slot == busy_until.size()) {
        busy_until.push_back(0);
        slot_widths_.push_back(0);
      }
      busy_until[slot] = std::max(last[x], s);
      slot_widths_[slot] = std::max(slot_widths_[slot], widths_[x]);
      slots_[x] = slot;
    }
}

void Program::check(const Call& call) const {
  expect(finished_, "program: is not finished");
  expect(call.rows > 0 && call.count > 0, "program: expected at least one row and one token");
  expect(call.inputs.size() == inputs_.size(), "program: expected ", inputs_.size(), " inputs, found ",
         call.inputs.size());
  for (std::size_t i = 0; i < inputs_.size(); ++i)
    expect(call.inputs[i].stride == widths_[inputs_[i]], "program: an input has the wrong width");
  expect(call.out.stride == widths_[result_], "program: out has the wrong width");
  const std::size_t tokens = call.rows * call.count;
  for (const Instruction& step : steps_) {
    if (step.kind == Kind::embed) {
      expect(call.ids, "program: expected token ids");
      const auto limit = static_cast<std::int64_t>(step.layers[0]->rows);
      for (std::size_t t = 0; t < tokens; ++t)
        expect(call.ids[t] >= 0 && call.ids[t] < limit, "program: token id ", call.ids[t], " lies outside the ", limit,
               " rows of ", step.layers[0]->name);
    }
    if (step.kind != Kind::rope && step.kind != Kind::attention && step.kind != Kind::positions) continue;
    expect(call.cache, "program: expected a cache");
    if (step.kind == Kind::positions) continue;
    const Pages& pages = call.cache->pages();
    const bool fits = step.block < pages.blocks() && step.size == pages.size() &&
                      (step.kind == Kind::rope ? widths_[step.from[1]] == pages.heads() * step.size
                                               : widths_[step.from[0]] % (pages.heads() * step.size) == 0);
    expect(fits, "program: the cache was made for another model");
  }
}

std::unique_ptr<Program::State> Program::take() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return std::make_unique<State>();
  std::unique_ptr<State> state = std::move(idle_.back());
  idle_.pop_back();
  return state;
}

void Program::run(const Call& call) const {
  check(call);
  std::unique_ptr<State> state = take();
  const std::size_t tokens = call.rows * call.count;
  state->places.assign(widths_.size(), nullptr);
  state->slots.resize(slot_widths_.size());
  for (std::size_t i = 0; i < inputs_.size(); ++i) state->places[inputs_[i]] = const_cast<float*>(call.inputs[i].data);
  for (Register x = 0; x < widths_.size(); ++x)
    if (slots_[x] != kNone) state->places[x] = state->slots[slots_[x]].reserve<float>(tokens * slot_widths_[slots_[x]]);
  state->places[result_] = call.out.data;
  state->angles_of = kNone;
  state->spans.clear();
  state->tokens.clear();
  if (call.cache) state->spans = call.cache->spans(call.rows, call.count);
  state->few = state->spans.empty() && call.count < kFewTokens ? tokens : 0;
  for (const Span& span : state->spans) {
    for (std::size_t t = 0; t < span.count; ++t) state->tokens.push_back({span.row, span.start + t});
    if (!span.few) continue;
    expect(state->few == span.first, "program: generated tokens must come before parts of prompts");
    state->few += span.count;
  }
  for (const Instruction& step : steps_) execute(step, call, *state);
  if (tokens > kMostKept) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(state));
}

}  // namespace mpo
