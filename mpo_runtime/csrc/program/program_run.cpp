// How each operation of a program is shared out among threads. Small ones stay on the calling thread.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "level.hpp"
#include "program/program_state.hpp"

namespace mpo {
namespace {

constexpr std::size_t kSmall = 1u << 15;          // fewer elements are not worth waking a thread for
constexpr std::size_t kExponentials = 1u << 11;   // elements of SwiGLU and GELU, whose exponentials are
constexpr std::size_t kQueriesPerTask = 64;       // that share keys and values in the cache
constexpr std::size_t kShortestSplit = 512;       // positions
constexpr std::size_t kTasksPerThread = 4;

// Calls f(token) for all tokens, on several threads where there is enough to do.
template <class F>
void for_tokens(std::size_t tokens, std::size_t width, F f) {
  const auto range = [&](std::size_t begin, std::size_t end) {
    for (std::size_t t = begin; t < end; ++t) f(t);
  };
  if (tokens * width < kSmall) return range(0, tokens);
  const std::size_t chunk = std::max<std::size_t>(1, kSmall / 2 / width);
  pool().run(tokens, chunk, range);
}

// Calls f(begin, end) for all of `count` elements whose exponentials are needed, likewise.
template <class F>
void for_elements(std::size_t count, F f) {
  if (count < 2 * kExponentials) return f(0, count);
  pool().run(count, kExponentials, f);
}

}  // namespace

void Program::execute(const Instruction& step, const Call& call, State& state) const {
  const Ops& ops = *active_level().ops;
  const std::size_t tokens = call.rows * call.count, width = widths_[step.to[0]];
  float* to = state.places[step.to[0]];
  const auto from = [&](std::size_t i) -> const float* { return state.places[step.from[i]]; };
  switch (step.kind) {
    case Kind::embed:
      return for_tokens(tokens, width, [&](std::size_t t) {
        step.layers[0]->row(static_cast<std::size_t>(call.ids[t]), to + t * width);
        ops.multiply(to + t * width, width, step.value, to + t * width);
      });
    case Kind::rms_norm:
      return for_tokens(tokens, width, [&, x = from(0), w = vectors_[step.vector].data()](std::size_t t) {
        for (std::size_t at = t * width; at < (t + 1) * width; at += step.size)
          ops.rms_norm(x + at, w, step.size, step.value, to + at);
      });
    case Kind::layer_norm: {
      const float *w = vectors_[step.vector].data(), *b = vectors_[step.bias].data();
      return for_tokens(tokens, width, [&, x = from(0)](std::size_t t) {
        ops.layer_norm(x + t * width, w, b, width, step.value, to + t * width);
      });
    }
    case Kind::positions: {
      const std::vector<float>& table = vectors_[step.vector];
      return for_tokens(tokens, width, [&, x = from(0), last = table.size() / width - 1](std::size_t t) {
        // The padding of a short row may reach past the end.
        const std::size_t position = std::min(state.lengths[t / call.count] + t % call.count, last);
        ops.add_scaled(x + t * width, table.data() + position * width, width, 1.0f, to + t * width);
      });
    }
    case Kind::linear:
      state.products.clear();
      for (std::size_t i = 0; i < step.layers.size(); ++i)
        state.products.push_back({step.layers[i].get(), state.places[step.to[i]]});
      return apply(state.products, from(0), tokens, exact_, state.work, pool());
    case Kind::rope: return rope(step, call, state);
    case Kind::attention: return attend(step, call, state);
    case Kind::gelu:
      return for_elements(tokens * width, [&, x = from(0)](std::size_t begin, std::size_t end) {
        ops.gelu(x + begin, end - begin, to + begin);
      });
    case Kind::swiglu:
      return for_elements(tokens * width, [&, gate = from(0), up = from(1)](std::size_t begin, std::size_t end) {
        ops.swiglu(gate + begin, up + begin, end - begin, to + begin);
      });
    case Kind::add_scaled:
      return for_tokens(tokens, width, [&, x = from(0), y = from(1)](std::size_t t) {
        ops.add_scaled(x + t * width, y + t * width, width, step.value, to + t * width);
      });
    case Kind::divide:
      return for_tokens(tokens, width, [&, x = from(0)](std::size_t t) {
        ops.multiply(x + t * width, width, 1.0f / step.value, to + t * width);
      });
  }
}

void Program::rope(const Instruction& step, const Call& call, State& state) const {
  const Ops& ops = *active_level().ops;
  const std::size_t tokens = call.rows * call.count, size = step.size, half = size / 2;
  const std::vector<float>& frequencies = vectors_[step.vector];
  const auto position = [&](std::size_t t) { return state.lengths[t / call.count] + t % call.count; };
  if (state.angles_of != step.vector) {  // the same for every block
    state.angles.resize(2 * tokens * half);
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position(t)) * frequencies[i];
        state.angles[t * half + i] = std::cos(angle);
        state.angles[(tokens + t) * half + i] = std::sin(angle);
      }
    state.angles_of = step.vector;
  }
  const std::size_t q_width = widths_[step.from[0]], k_width = widths_[step.from[1]];
  const float *q = state.places[step.from[0]], *k = state.places[step.from[1]], *v = state.places[step.from[2]];
  float* to = state.places[step.to[0]];
  for_tokens(tokens, q_width + 2 * k_width, [&](std::size_t t) {
    const float *cosine = state.angles.data() + t * half, *sine = state.angles.data() + (tokens + t) * half;
    for (std::size_t at = 0; at < q_width; at += size)
      ops.rotate(q + t * q_width + at, cosine, sine, size, to + t * q_width + at);
    if (position(t) >= call.cache->capacity()) return;  // the padding of a short row may reach past the end
    thread_local std::vector<float> key;
    key.resize(size);
    for (std::size_t head = 0; head < k_width / size; ++head) {
      ops.rotate(k + t * k_width + head * size, cosine, sine, size, key.data());
      call.cache->store(ops, step.block, t / call.count, head, position(t), key.data(), v + t * k_width + head * size);
    }
  });
}

void Program::attend(const Instruction& step, const Call& call, State& state) const {
  const Ops& ops = *active_level().ops;
  const Cache& cache = *call.cache;
  const std::size_t size = step.size, width = widths_[step.to[0]], share = width / size / cache.heads();
  const std::size_t span = std::min(call.count, std::max<std::size_t>(1, kQueriesPerTask / share));  // tokens of a task
  const std::size_t spans = (call.count + span - 1) / span, queries = span * share;
  const std::size_t tasks = call.rows * cache.heads() * spans;
  const std::size_t longest = *std::max_element(state.lengths.begin(), state.lengths.end()) + call.count;
  const std::size_t context = std::min(longest, cache.capacity());
  const std::size_t wanted = kTasksPerThread * static_cast<std::size_t>(pool().threads());
  // What no query's window reaches is not split; whole blocks are left out, so that those of the cache stay whole.
  const auto first_seen = [&](std::size_t length) { return step.window && length > step.window ? length - step.window : 0; };
  const std::size_t shortest = *std::min_element(state.lengths.begin(), state.lengths.end());
  const std::size_t unseen = first_seen(shortest + 1) / kShortestSplit * kShortestSplit;
  const std::size_t splits = std::max<std::size_t>(
      1, std::min((wanted + tasks - 1) / tasks, (context - unseen) / kShortestSplit));
  const std::size_t part = (context - unseen + splits - 1) / splits, step_size = queries * (size + 2);
  if (state.partial.size() < tasks * splits * step_size) state.partial.resize(tasks * splits * step_size);
  const float* q = state.places[step.from[0]];
  float* to = state.places[step.to[0]];

  struct Place {
    std::size_t row, head, first, tokens;
  };
  const auto place = [&](std::size_t task) {
    const std::size_t first = task % spans * span;
    return Place{task / spans / cache.heads(), task / spans % cache.heads(), first, std::min(span, call.count - first)};
  };
  const auto mixed = [&](std::size_t task, std::size_t split) {
    return state.partial.data() + (task * splits + split) * step_size;
  };
  const auto attend_part = [&](std::size_t task, std::size_t split) {
    const Place at = place(task);
    thread_local std::vector<const float*> pointers;
    thread_local std::vector<std::size_t> firsts, limits;
    pointers.clear();
    firsts.clear();
    limits.clear();
    for (std::size_t s = at.first; s < at.first + at.tokens; ++s)
      for (std::size_t h = at.head * share; h < (at.head + 1) * share; ++h) {
        pointers.push_back(q + (at.row * call.count + s) * width + h * size);
        limits.push_back(std::min(state.lengths[at.row] + s + 1, cache.capacity()));
        firsts.push_back(first_seen(limits.back()));
      }
    float* out = mixed(task, split);
    ops.attend({cache.place(step.block, at.row, at.head), unseen + split * part,
                std::min(unseen + (split + 1) * part, context), pointers.size(), pointers.data(), firsts.data(),
                limits.data(), step.value, out, out + queries * size, out + queries * (size + 1)});
  };
  const auto join = [&](std::size_t task) {
    const Place at = place(task);
    for (std::size_t m = 0; m < at.tokens * share; ++m) {
      const std::size_t token = at.row * call.count + at.first + m / share, head = at.head * share + m % share;
      float* out = to + token * width + head * size;
      float peak = mixed(task, 0)[queries * size + m], total = 0;
      for (std::size_t split = 1; split < splits; ++split)
        peak = std::max(peak, mixed(task, split)[queries * size + m]);
      std::memset(out, 0, size * sizeof(float));
      for (std::size_t split = 0; split < splits; ++split) {
        const float* from = mixed(task, split);
        const float factor = splits == 1 ? 1.0f : std::exp(from[queries * size + m] - peak);
        total += factor * from[queries * (size + 1) + m];
        ops.add_scaled(out, from + m * size, size, factor, out);
      }
      ops.multiply(out, size, 1.0f / total, out);
    }
  };
  const auto range = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      attend_part(i / splits, i % splits);
      if (splits == 1) join(i);
    }
  };
  if (tasks == 1 || tasks * queries * context * size < kSmall) range(0, tasks * splits);
  else pool().run(tasks * splits, 1, range);
  if (splits > 1)
    for (std::size_t task = 0; task < tasks; ++task) join(task);
}

}  // namespace mpo
