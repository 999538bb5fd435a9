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
constexpr std::size_t kProducts = 1u << 17;       // multiply-adds of a transform that are
// Queries that share keys and values in the cache: more where that leaves enough tasks for all threads, but those of a float32
// task all multiply what only the last of them see.
constexpr std::size_t kQueriesPerTask = 64, kMostQueries = 256, kMostRounded = 1024;
// Positions whose softmax is one running sum; longer contexts are sums of several, joined in order. It is the same whoever
// computes them, so that a token's result depends on its own sequence alone.
constexpr std::size_t kSegment = 512, kPromptSegment = 2048;
constexpr std::size_t kFewQueries = 8;  // below this a product with transposed keys does not pay
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

// Calls f(begin, end) for all blocks of a transform, likewise: each is multiplied with a matrix [block, block].
template <class F>
void for_blocks(std::size_t blocks, std::size_t block, F f) {
  if (blocks * block * block < kProducts) return f(0, blocks);
  pool().run(blocks, std::max<std::size_t>(4, kProducts / 2 / (block * block)), f);
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
        const std::size_t position = std::min(state.tokens[t].position, last);
        ops.add_scaled(x + t * width, table.data() + position * width, width, 1.0f, to + t * width);
      });
    }
    case Kind::linear:
      // Generated tokens and prompts are computed in different ways, so they are not in one product; then no row's result
      // depends on what else is in the step.
      if (state.few) multiply(step, {0, state.few}, exact_ ? Arithmetic::floats : Arithmetic::codes, state);
      if (state.few < tokens)
        multiply(step, {state.few, tokens}, exact_ ? Arithmetic::prompt_floats : Arithmetic::prompt, state);
      return;
    case Kind::hadamard:
      return for_tokens(tokens, width, [&, x = from(0)](std::size_t t) {
        ops.hadamard(x + t * width, width, step.size, to + t * width);
      });
    case Kind::transform: {
      const Transform& transform = *step.matrices;
      return for_blocks(tokens * width / transform.block(), transform.block(), [&, x = from(0)](std::size_t begin, std::size_t end) {
        transform.apply(x, begin, end, to);
      });
    }
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

void Program::multiply(const Instruction& step, TokenRange range, Arithmetic arithmetic, State& state) const {
  state.products.clear();
  for (std::size_t i = 0; i < step.layers.size(); ++i)
    state.products.push_back({step.layers[i].get(), state.places[step.to[i]] + range.begin * step.layers[i]->rows});
  const float* x = state.places[step.from[0]] + range.begin * widths_[step.from[0]];
  apply(state.products, x, range.end - range.begin, arithmetic, state.work, pool());
}

void Program::rope(const Instruction& step, const Call& call, State& state) const {
  const Ops& ops = *active_level().ops;
  const std::size_t tokens = call.rows * call.count, size = step.size, half = size / 2;
  const std::vector<float>& frequencies = vectors_[step.vector];
  if (state.angles_of != step.vector) {  // the same for every block
    state.angles.resize(2 * tokens * half);
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(state.tokens[t].position) * frequencies[i];
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
    const std::size_t position = state.tokens[t].position;
    if (position >= call.cache->capacity()) return;  // the padding of a short row may reach past the end
    thread_local std::vector<float> key;
    key.resize(size);
    std::uint8_t* page = call.cache->table(state.tokens[t].row)[position / kPagePositions];
    for (std::size_t head = 0; head < k_width / size; ++head) {
      const std::size_t at = t * k_width + head * size;
      ops.rotate(k + at, cosine, sine, size, key.data());
      call.cache->pages().store(ops, step.block, head, page, position % kPagePositions, key.data(), v + at);
    }
  });
}

namespace {

// The queries of some tokens of a sequence that share a key-value head.
struct AttentionPart {
  const Span* span;
  std::size_t head, first, tokens;  // `first` token of the span
  std::size_t length, segment, segments;  // positions of a segment, the first one that it sees, and how many
};

// Attention of one block in one call.
class Attention {
 public:
  struct Shape {
    std::size_t size, width, share, block;  // of a head, of q, query heads for each head of the cache
    float scale;
    std::size_t window;
    bool exact;  // else products of prompts may be rounded, unless the cache is float32
  };
  Attention(const Shape& shape, const Cache& cache, const std::vector<Span>& spans, const float* q, float* to)
      : shape_(shape), cache_(cache), q_(q), to_(to),
        rounded_(!shape.exact && cache.pages().type() != Type::f32 ? rounded_attention() : nullptr),
        most_(tokens_of_a_task(shape, cache, spans, rounded_ ? kMostRounded : kMostQueries)) {
    for (const Span& span : spans)
      for (std::size_t head = 0; head < cache.pages().heads(); ++head)
        for (std::size_t first = 0; first < span.count; first += most_) {
          const std::size_t tokens = std::min(most_, span.count - first);
          const std::size_t length = span.few ? kSegment : kPromptSegment;
          const std::size_t begin = first_seen(limit(span, first)) / length;
          const std::size_t end = (limit(span, first + tokens - 1) + length - 1) / length;
          parts_.push_back({&span, head, first, tokens, length, begin, end - begin});
        }
  }

  void run(std::vector<float>& partial) const {
    std::size_t segments = 0, work = 0;
    for (const AttentionPart& part : parts_) {
      segments += part.segments;
      work += part.segments * std::min(part.length, cache_.capacity()) * part.tokens;
    }
    const std::size_t wanted = kTasksPerThread * static_cast<std::size_t>(pool().threads());
    const bool small = work * shape_.share * shape_.size < kSmall;
    if (parts_.size() < wanted && segments > parts_.size() && !small) return run_segments(partial);
    const auto range = [&](std::size_t begin, std::size_t end) {
      thread_local std::vector<float> own;
      for (std::size_t i = begin; i < end; ++i) {
        if (own.size() < parts_[i].segments * room()) own.resize(parts_[i].segments * room());
        for (std::size_t segment = 0; segment < parts_[i].segments; ++segment)
          attend(parts_[i], segment, own.data() + segment * room());
        join(parts_[i], own.data());
      }
    };
    if (small) range(0, parts_.size());
    else pool().run(parts_.size(), 1, range);
  }

 private:
  // Few sequences with long contexts: the segments are shared out among the threads.
  void run_segments(std::vector<float>& partial) const {
    struct Piece {
      const AttentionPart* part;
      std::size_t segment;
      std::size_t at;
    };
    std::vector<Piece> pieces;
    for (const AttentionPart& part : parts_)
      for (std::size_t segment = 0; segment < part.segments; ++segment)
        pieces.push_back({&part, segment, pieces.size() * room()});
    if (partial.size() < pieces.size() * room()) partial.resize(pieces.size() * room());
    pool().run(pieces.size(), 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) attend(*pieces[i].part, pieces[i].segment, partial.data() + pieces[i].at);
    });
    const float* at = partial.data();
    for (const AttentionPart& part : parts_) {
      join(part, at);
      at += part.segments * room();
    }
  }

  static std::size_t tokens_of_a_task(const Shape& shape, const Cache& cache, const std::vector<Span>& spans, std::size_t most) {
    std::size_t queries = 0;
    for (const Span& span : spans) queries += span.count * shape.share * cache.pages().heads();
    const std::size_t share = queries / (kTasksPerThread * static_cast<std::size_t>(pool().threads()));
    return std::max<std::size_t>(1, std::clamp(share, kQueriesPerTask, most) / shape.share);
  }

  std::size_t queries() const { return most_ * shape_.share; }
  std::size_t room() const { return queries() * (shape_.size + 2); }  // floats of a part in one segment
  // Positions that a token sees; padding sees what there is.
  std::size_t limit(const Span& span, std::size_t token) const {
    return std::min(span.start + token + 1, cache_.capacity());
  }
  std::size_t first_seen(std::size_t limit) const {
    return shape_.window && limit > shape_.window ? limit - shape_.window : 0;
  }

  void attend(const AttentionPart& part, std::size_t segment, float* out) const {
    thread_local std::vector<const float*> pointers;
    thread_local std::vector<std::size_t> firsts, limits;
    pointers.clear();
    firsts.clear();
    limits.clear();
    for (std::size_t s = part.first; s < part.first + part.tokens; ++s)
      for (std::size_t h = part.head * shape_.share; h < (part.head + 1) * shape_.share; ++h) {
        pointers.push_back(q_ + (part.span->first + s) * shape_.width + h * shape_.size);
        limits.push_back(limit(*part.span, s));
        firsts.push_back(first_seen(limits.back()));
      }
    const KvPlace place = cache_.pages().place(shape_.block, part.head, cache_.table(part.span->row));
    const std::size_t begin = (part.segment + segment) * part.length;
    const Attend attend = rounded_ && !part.span->few ? rounded_ : active_level().ops->attend;
    attend({place, begin, begin + part.length, part.span->few && shape_.share < kFewQueries, pointers.size(),
            pointers.data(), firsts.data(), limits.data(), shape_.scale, out, out + queries() * shape_.size,
            out + queries() * (shape_.size + 1)});
  }

  // Adds up the segments, the first one first. One that a query does not see adds zeros.
  void join(const AttentionPart& part, const float* partial) const {
    const Ops& ops = *active_level().ops;
    const std::size_t size = shape_.size, peaks = queries() * size, sums = peaks + queries();
    for (std::size_t m = 0; m < part.tokens * shape_.share; ++m) {
      const std::size_t token = part.span->first + part.first + m / shape_.share;
      float* out = to_ + token * shape_.width + (part.head * shape_.share + m % shape_.share) * size;
      float peak = partial[peaks + m], total = 0;
      for (std::size_t s = 1; s < part.segments; ++s) peak = std::max(peak, partial[s * room() + peaks + m]);
      std::memset(out, 0, size * sizeof(float));
      for (std::size_t s = 0; s < part.segments; ++s) {
        const float* from = partial + s * room();
        const float factor = part.segments == 1 ? 1.0f : std::exp(from[peaks + m] - peak);
        total += factor * from[sums + m];
        ops.add_scaled(out, from + m * size, size, factor, out);
      }
      ops.multiply(out, size, 1.0f / total, out);
    }
  }

  const Shape shape_;
  const Cache& cache_;
  const float* q_;
  float* to_;
  Attend rounded_;    // for prompts, or null
  std::size_t most_;  // tokens of a part
  std::vector<AttentionPart> parts_;
};

}  // namespace

void Program::attend(const Instruction& step, const Call& call, State& state) const {
  const std::size_t size = step.size, width = widths_[step.to[0]], share = width / size / call.cache->pages().heads();
  const Attention::Shape shape{size, width, share, step.block, step.value, step.window, exact_};
  Attention(shape, *call.cache, state.spans, state.places[step.from[0]], state.places[step.to[0]]).run(state.partial);
}

}  // namespace mpo
