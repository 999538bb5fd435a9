#include "level.hpp"

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "check.hpp"
#include "fit/product.hpp"
#include "target.hpp"

#if MPO_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif MPO_ARM && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mpo {
namespace {

#if MPO_X86
struct Cpu {
  bool avx2 = false, avx512 = false, vbmi = false, bf16 = false, amx = false;
};

#if defined(MPO_EMULATED_INTRINSICS)
Cpu look() { return {true, true, true, true, true}; }  // tests: what the CPU lacks is emulated
#else
bool has(std::uint32_t bits, int bit) { return (bits >> bit) & 1u; }

// The register states that the operating system saves; an instruction set without its state must not be used.
std::uint64_t saved_states() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux gives the 8 KiB of tile registers only to a process that asks, and may refuse.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Bits of CPUID leaves 1 and 7 (Intel's Software Developer's Manual, volume 2A).
Cpu look() {
  constexpr std::uint64_t kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  Cpu cpu;
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = has(c, 12), os_saves = has(c, 27), avx = has(c, 28), f16c = has(c, 29);
  if (!(fma && f16c && avx && os_saves)) return cpu;
  const std::uint64_t states = saved_states();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.avx2 = has(b, 5) && (states & kYmm) == kYmm;
  const bool f = has(b, 16), dq = has(b, 17), bw = has(b, 30), vl = has(b, 31), vnni = has(c, 11);
  cpu.avx512 = cpu.avx2 && f && dq && bw && vl && vnni && (states & kZmm) == kZmm;
  cpu.vbmi = cpu.avx512 && has(c, 1);
  const bool bf16_tiles = has(d, 22), tile = has(d, 24), int8 = has(d, 25);
  cpu.bf16 = cpu.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
  cpu.amx = cpu.vbmi && cpu.bf16 && tile && int8 && bf16_tiles && (states & kTile) == kTile && tiles_permitted();
  return cpu;
}
#endif

const Cpu& cpu() {
  static const Cpu found = look();
  return found;
}
#endif

#if MPO_ARM
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__APPLE__)
  return true;  // every Apple AArch64 CPU that runs a desktop system has them
#else
  return false;
#endif
}
#endif

// Best first. Features of each: MPO_AVX2 and its neighbours in target.hpp.
const Level kLevels[] = {
#if MPO_X86
    {"amx", [] { return cpu().amx; }, &kAmxIntegers, &kAvx512Floats, &kAvx512Ops, &kAvx512Fits, dequantize_avx2, &kAmxPanels, &kAvx512FloatPanels},
    {"vbmi", [] { return cpu().vbmi; }, &kVbmiIntegers, &kAvx512Floats, &kAvx512Ops, &kAvx512Fits, dequantize_avx2, &kVnniPanels, &kAvx512FloatPanels},
    {"avx512", [] { return cpu().avx512; }, &kAvx512Integers, &kAvx512Floats, &kAvx512Ops, &kAvx512Fits, dequantize_avx2, &kVnniPanels, &kAvx512FloatPanels},
    {"avx2", [] { return cpu().avx2; }, &kAvx2Integers, &kAvx2Floats, &kAvx2Ops, &kAvx2Fits, dequantize_avx2, &kAvx2Panels, &kAvx2FloatPanels},
#endif
#if MPO_ARM
    {"neon", has_dot_products, &kNeonIntegers, &kNeonFloats, &kNeonOps, &kNeonFits, dequantize_generic, nullptr, nullptr},
#endif
    {"generic", [] { return true; }, &kGenericIntegers, &kGenericFloats, &kGenericOps, &kGenericFits, dequantize_generic, nullptr, nullptr},
};

const std::vector<const Level*>& supported() {
  static const std::vector<const Level*> found = [] {
    std::vector<const Level*> levels;
    for (const Level& level : kLevels)
      if (level.detect()) levels.push_back(&level);
    return levels;
  }();
  return found;
}

const Level* find(const std::string& name) {
  if (name == "auto") return supported().front();
  for (const Level* level : supported())
    if (name == level->name) return level;
  return nullptr;
}

std::string joined_names() {
  std::string text;
  for (const std::string& name : supported_levels()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::atomic<const Level*> chosen{nullptr};

}  // namespace

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level* level : supported()) names.push_back(level->name);
  return names;
}

const Level& active_level() {
  if (const Level* level = chosen.load(std::memory_order_relaxed)) return *level;
  const char* wanted = std::getenv("MPO_ISA");
  const Level* level = find(wanted && *wanted ? wanted : "auto");
  if (!level)
    fail("MPO_ISA is '", wanted, "', expected one of auto, ", joined_names(),
         " on this machine; unset it or choose one of these");
  chosen.store(level, std::memory_order_relaxed);
  return *level;
}

const Level& level_named(const char* where, const std::string& name) {
  const Level* level = find(name);
  if (!level)
    fail(where, ": this CPU or build has no instruction set '", name, "', expected one of auto, ", joined_names());
  return *level;
}

const PairKernels* pair_kernels() {
#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)
  if (cpu().bf16 && active_level().float_panels == &kAvx512FloatPanels) return &kBf16Pairs;
#endif
  return nullptr;
}

Attend rounded_attention() {
#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)
  if (active_level().panels == &kAmxPanels) return kAmxAttend;
  if (cpu().bf16 && active_level().ops == &kAvx512Ops) return kBf16Attend;
#endif
  return nullptr;
}

bool set_level(const std::string& name) {
  const Level* level = find(name);
  if (level) chosen.store(level, std::memory_order_relaxed);
  return level != nullptr;
}

}  // namespace mpo
