// Group-wise quantised weights back to float32, for the reference backend, embeddings and cores.
//
// A weight of `bits` is stored as one or two bit planes (low plane first): 8, 4 and 2 bits are one plane, 6 = 4 + 2,
// 5 = 4 + 1, 3 = 2 + 1. In a plane of p bits, element j of its group sits in byte (j * p) / 8 at bit (j * p) % 8.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_unpack.hpp"
#include "half.hpp"
#include "isa.hpp"
#include "kernels.hpp"
#include "unpack.hpp"

#if defined(__GNUC__) || defined(__clang__)
#define MPO_RESTRICT __restrict__
#else
#define MPO_RESTRICT
#endif

// Functions compiled for more than the baseline, chosen at run time by what the CPU reports.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MPO_HAVE_AVX2 1
#define MPO_AVX2 __attribute__((target("avx2")))
#else
#define MPO_HAVE_AVX2 0
#endif

// A failed build is not an error: the package then installs without native kernels.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "these kernels read packed fields as little-endian words"
#endif

namespace nb = nanobind;

namespace mpo {
namespace {

constexpr std::size_t kLargestGroup = 256;
constexpr std::size_t kTile = 2048;  // elements unpacked at a time: long loops for the compiler, levels in the L1 cache
static_assert(kTile % kLargestGroup == 0);

struct Job {
  int bits;
  std::size_t blocks;  // rows * groups
  std::size_t group;   // elements of one block
  const std::uint8_t* low;
  const std::uint8_t* high;  // null where one plane holds all bits
  const std::uint16_t* scale;
  const std::uint16_t* zero;  // null: implicit_zero(bits)
  float* out;
};

// Spreads 8 elements of `Bits` bits, packed in the low bits of `packed`, to one element per byte. Each step halves the
// fields' width and doubles their distance; plain 64-bit arithmetic, so that the compiler can run it in vectors.
template <int Bits>
MPO_INLINE std::uint64_t spread(std::uint64_t packed) {
  if constexpr (Bits == 8) return packed;
  packed = (packed | (packed << (32 - 4 * Bits))) & (0x0000000100000001u * ((1ull << (4 * Bits)) - 1));
  packed = (packed | (packed << (16 - 2 * Bits))) & (0x0001000100010001u * ((1ull << (2 * Bits)) - 1));
  packed = (packed | (packed << (8 - Bits))) & (0x0101010101010101u * ((1ull << Bits) - 1));
  return packed;
}

// Writes 8 * `eights` elements of a `Low`-bit plane, with those of a `High`-bit plane (0: none) above them.
template <int Low, int High>
MPO_INLINE void unpack(const std::uint8_t* low, const std::uint8_t* high, std::size_t eights, std::uint8_t* levels) {
  for (std::size_t i = 0; i < eights; ++i) {
    std::uint64_t packed = 0;
    std::memcpy(&packed, low + i * Low, Low);  // 8 elements of p bits are p bytes
    std::uint64_t level = spread<Low>(packed);
    if constexpr (High > 0) {
      packed = 0;
      std::memcpy(&packed, high + i * High, High);
      level |= spread<High>(packed) << Low;
    }
    std::memcpy(levels + i * 8, &level, 8);
  }
}

MPO_INLINE void convert(const std::uint8_t* MPO_RESTRICT levels, std::size_t group, float scale, float zero,
                        float* MPO_RESTRICT out) {
  for (std::size_t j = 0; j < group; ++j) out[j] = scale * (static_cast<float>(static_cast<int>(levels[j])) - zero);
}

template <int Low, int High>
MPO_INLINE void dequantize_planes(const Job& job) {
  alignas(32) std::uint8_t levels[kTile];
  const std::size_t tile_blocks = kTile / job.group;
  for (std::size_t start = 0; start < job.blocks; start += tile_blocks) {
    const std::size_t stop = std::min(start + tile_blocks, job.blocks);
    const std::size_t first = start * (job.group / 8);
    unpack<Low, High>(job.low + first * Low, High ? job.high + first * High : nullptr,
                      (stop - start) * (job.group / 8), levels);
    for (std::size_t block = start; block < stop; ++block) {
      const float scale = half_to_float(job.scale[block]);
      const float zero = job.zero ? half_to_float(job.zero[block]) : implicit_zero(Low + High);
      convert(levels + (block - start) * job.group, job.group, scale, zero, job.out + block * job.group);
    }
  }
}

MPO_INLINE void dequantize_bits(const Job& job) {
  switch (job.bits) {
    case 8: return dequantize_planes<8, 0>(job);
    case 6: return dequantize_planes<4, 2>(job);
    case 5: return dequantize_planes<4, 1>(job);
    case 4: return dequantize_planes<4, 0>(job);
    case 3: return dequantize_planes<2, 1>(job);
    default: return dequantize_planes<2, 0>(job);
  }
}

using Kernel = void (*)(const Job&);

struct Variant {
  std::string isa;
  Kernel kernel;
};

void dequantize_generic(const Job& job) { dequantize_bits(job); }

#if MPO_HAVE_AVX2
MPO_AVX2 void dequantize_avx2(const Job& job) { dequantize_bits(job); }
#endif

// What this CPU can run, best first; the last entry is what the compiler's baseline allows.
std::vector<Variant> find_variants() {
  std::vector<Variant> variants;
#if MPO_HAVE_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) variants.push_back({"avx2", dequantize_avx2});
#endif
  variants.push_back({"generic", dequantize_generic});
  return variants;
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = find_variants();
  return found;
}

Kernel kernel_for(const std::string& isa) {
  if (isa.empty()) return variants().front().kernel;
  for (const Variant& variant : variants())
    if (variant.isa == isa) return variant.kernel;
  throw std::invalid_argument("dequantize: this CPU or build has no instruction set '" + isa + "'; isas() lists what it has");
}

std::vector<int> plane_bits(int bits) {
  switch (bits) {
    case 8: return {8};
    case 6: return {4, 2};
    case 5: return {4, 1};
    case 4: return {4};
    case 3: return {2, 1};
    case 2: return {2};
    default: throw std::invalid_argument("dequantize: bits is " + std::to_string(bits) + ", expected 8, 6, 5, 4, 3 or 2");
  }
}

using Plane = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::string shape_text(const std::vector<std::size_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <typename Array>
void expect_shape(const std::string& name, const Array& array, const std::vector<std::size_t>& expected) {
  std::vector<std::size_t> shape;
  for (std::size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
  if (shape != expected)
    throw std::invalid_argument("dequantize: " + name + " has shape " + shape_text(shape) + ", expected " +
                                shape_text(expected));
}

void dequantize(const std::vector<Plane>& planes, int bits, const Halves& scale, const std::optional<Halves>& zero,
                const Output& out, const std::string& isa) {
  const std::vector<int> widths = plane_bits(bits);
  if (planes.size() != widths.size())
    throw std::invalid_argument("dequantize: " + std::to_string(bits) + " bits are " + std::to_string(widths.size()) +
                                " plane(s), got " + std::to_string(planes.size()));
  const std::size_t rows = planes[0].shape(0), groups = planes[0].shape(1);
  const std::size_t group = planes[0].shape(2) * 8 / static_cast<std::size_t>(widths[0]);
  if (group != 16 && group != 32 && group != 64 && group != 128 && group != kLargestGroup)
    throw std::invalid_argument("dequantize: plane 0 holds groups of " + std::to_string(group) +
                                " elements, expected 16, 32, 64, 128 or 256");
  for (std::size_t i = 0; i < planes.size(); ++i)
    expect_shape("plane " + std::to_string(i), planes[i],
                 {rows, groups, group * static_cast<std::size_t>(widths[i]) / 8});
  expect_shape("scale", scale, {rows, groups});
  if (zero) expect_shape("zero", *zero, {rows, groups});
  expect_shape("out", out, {rows, groups * group});

  const Job job{bits,         rows * groups,
                group,        planes[0].data(),
                planes.size() > 1 ? planes[1].data() : nullptr,
                scale.data(), zero ? zero->data() : nullptr,
                out.data()};
  const Kernel kernel = kernel_for(isa);
  nb::gil_scoped_release release;
  kernel(job);
}

}  // namespace

void dequantize_groups(const QuantizedMatrix& w, std::size_t r, std::size_t first, std::size_t count, float* out) {
  const std::size_t start = r * (w.columns / w.group) + first, bytes = start * (w.group / 8);
  const Job job{w.bits,
                count,
                w.group,
                w.low + bytes * static_cast<std::size_t>(low_bits(w.bits)),
                w.high ? w.high + bytes * static_cast<std::size_t>(high_bits(w.bits)) : nullptr,
                w.scale + start,
                w.zero ? w.zero + start : nullptr,
                out};
  const Isa isa = active_isa();
  (isa == Isa::generic || isa == Isa::neon ? variants().back() : variants().front()).kernel(job);
}

void bind_unpack(nb::module_& module) {
  // noconvert: a silent copy of a wrong dtype would hide a mistake, and a copied `out` would lose the result.
  module.def("dequantize", &dequantize, nb::arg("planes").noconvert(), nb::arg("bits"), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert().none(), nb::arg("out").noconvert(), nb::arg("isa") = "");
  module.def("isa", [] { return variants().front().isa; });
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.push_back(variant.isa);
    return names;
  });
}

}  // namespace mpo
