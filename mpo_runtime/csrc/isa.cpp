#include "isa.hpp"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "kernels.hpp"

#if MPO_X86_KERNELS
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif MPO_ARM_KERNELS && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mpo {
namespace {

constexpr Isa kAll[] = {Isa::amx, Isa::vbmi, Isa::avx512, Isa::avx2, Isa::neon, Isa::generic};

#if defined(MPO_EMULATED_INTRINSICS)
Isa best_of_cpu() { return Isa::amx; }  // tests: the kernels above the compiler's level are emulated
#elif MPO_X86_KERNELS
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

Isa best_of_cpu() {
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::generic;
  const bool fma = has(c, 12), f16c = has(c, 29), avx = has(c, 28), os_saves = has(c, 27);
  if (!(fma && f16c && avx && os_saves)) return Isa::generic;
  const std::uint64_t states = saved_states();
  constexpr std::uint64_t kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  std::uint32_t b7, c7, d7;
  if ((states & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !has(b7, 5)) return Isa::generic;
  const bool avx512 = has(b7, 16) && has(b7, 17) && has(b7, 30) && has(b7, 31) && has(c7, 11);
  if (!avx512 || (states & kZmm) != kZmm) return Isa::avx2;
  if (!has(c7, 1)) return Isa::avx512;
  const bool amx = has(d7, 24) && has(d7, 25) && (states & kTile) == kTile;
  return amx && tiles_permitted() ? Isa::amx : Isa::vbmi;
}
#elif MPO_ARM_KERNELS
Isa best_of_cpu() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts ? Isa::neon : Isa::generic;
#elif defined(__APPLE__)
  return Isa::neon;  // every Apple AArch64 CPU that runs a desktop system has them
#else
  return Isa::generic;
#endif
}
#else
Isa best_of_cpu() { return Isa::generic; }
#endif

Isa best() {
  static const Isa found = best_of_cpu();
  return found;
}

bool supported(Isa isa) {
  if (isa == Isa::generic) return true;
  if (isa == Isa::neon) return best() == Isa::neon;
  return best() != Isa::neon && isa <= best();
}

bool find(const std::string& name, Isa* isa) {
  if (name == "auto") {
    *isa = best();
    return true;
  }
  for (const Isa candidate : kAll)
    if (name == isa_name(candidate)) {
      *isa = candidate;
      return supported(candidate);
    }
  return false;
}

std::string names() {
  std::string text;
  for (const std::string& name : supported_isas()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::vbmi: return "vbmi";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::neon: return "neon";
    default: return "generic";
  }
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> found;
  for (const Isa isa : kAll)
    if (supported(isa)) found.push_back(isa_name(isa));
  return found;
}

Isa active_isa() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now != kUnset) return static_cast<Isa>(now);
  const char* wanted = std::getenv("MPO_ISA");
  Isa isa = best();
  if (wanted && *wanted && !find(wanted, &isa))
    throw std::invalid_argument(std::string("MPO_ISA is '") + wanted + "', expected one of auto, " + names() +
                                " on this machine; unset it or choose one of these");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

bool set_isa(const std::string& name) {
  Isa isa;
  if (!find(name, &isa)) return false;
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace mpo
