// The x86 intrinsics: the compiler's, or an emulation that lets the tests run instruction sets that their CPU lacks.
#pragma once

#if defined(MPO_EMULATED_INTRINSICS)
#include MPO_EMULATED_INTRINSICS
#else
#if defined(__GNUC__) && !defined(__clang__)
// gcc's own AVX-512 headers start from undefined vectors, and each use of them warns.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif
