// Which instruction set the kernels use: the best that this CPU, its operating system and this build can run, or less.
#pragma once

#include <string>
#include <vector>

namespace mpo {

// avx2 = AVX2 + FMA + F16C; avx512 = F + BW + DQ + VL + VNNI; vbmi = avx512 + VBMI; amx = vbmi + AMX-INT8 with the
// kernel's permission; neon = AArch64 with dot products.
enum class Isa { generic, neon, avx2, avx512, vbmi, amx };

const char* isa_name(Isa isa);

// What this CPU can run, best first; the last one is always `generic`.
std::vector<std::string> supported_isas();

// The level in use: the best supported one, unless the environment variable MPO_ISA or set_isa() chose another.
// Throws std::invalid_argument where MPO_ISA names a level that is unknown or that this CPU cannot run.
Isa active_isa();

// Chooses a level by name, or the best one with "auto"; false (and no change) where this CPU cannot run it.
bool set_isa(const std::string& name);

}  // namespace mpo
