// What the compiler can do, and how a source file asks it for an instruction set beyond the baseline.
//
// One binary runs on every CPU of its architecture, so most code is compiled for the baseline. A source file of an
// instruction set includes the shared headers first, then says MPO_BEGIN_TARGET, then includes its vectors and the
// templates written over them (the *_body.hpp files), and ends with MPO_END_TARGET. Everything between the two lies in
// anonymous namespaces: an inline function with external linkage would be compiled once for each instruction set, and the
// linker would keep any one of these copies and run it on every CPU.
#pragma once

// Where one of these is 0, the sources of those instruction sets are empty.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MPO_X86 1
#else
#define MPO_X86 0
#endif
#if (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
#define MPO_ARM 1
#else
#define MPO_ARM 0
#endif

// The features that the compiler may use for each instruction set; detection in level.cpp asks for the same.
#define MPO_AVX2 "avx2,fma,f16c"
#define MPO_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define MPO_VBMI MPO_AVX512 ",avx512vbmi"
#define MPO_BF16 MPO_AVX512 ",avx512bf16"
#define MPO_AMX MPO_AVX512 ",avx512bf16,amx-tile,amx-int8,amx-bf16"
#if defined(__clang__)
#define MPO_NEON "dotprod"
#else
#define MPO_NEON "arch=armv8.2-a+dotprod"
#endif

#define MPO_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(MPO_EMULATED_INTRINSICS)  // tests: the intrinsics are functions of the baseline
#define MPO_BEGIN_TARGET(features)
#define MPO_END_TARGET
#elif defined(__clang__)
#define MPO_BEGIN_TARGET(features) \
  MPO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MPO_END_TARGET MPO_PRAGMA(clang attribute pop)
#else
#define MPO_BEGIN_TARGET(features) MPO_PRAGMA(GCC target(features))
#define MPO_END_TARGET  // to the end of the file, where templates are instantiated
#endif

// Not where intrinsics are emulated: each is a function then, and all of them in each kernel take gigabytes to compile.
#if (defined(__GNUC__) || defined(__clang__)) && !defined(MPO_EMULATED_INTRINSICS)
#define MPO_INLINE __attribute__((always_inline)) inline
#else
#define MPO_INLINE inline
#endif
#if defined(__GNUC__) || defined(__clang__)
#define MPO_RESTRICT __restrict__
#else
#define MPO_RESTRICT
#endif

// A failed build is no error: the package is then installed without native kernels.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "these kernels read packed fields as little-endian words"
#endif
