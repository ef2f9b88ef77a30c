/* Vectors as wide as the processor's, in GNU C, which gcc and clang lower to what the processor has.

   Sums go in one fixed order, whatever the number of threads or rows: results do not depend on either. */

#pragma once
#include <stdint.h>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline, unused)) /* what is inlined in many places takes long to compile */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
/* The same at any address. */
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t shorts_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE floats get(const float *p) { return *(const floats_at *)p; }
INLINE void put(float *p, floats v) { *(floats_at *)p = v; }
INLINE floats all(float x) { return x - (floats){0}; }
INLINE floats choose(ints yes, floats a, floats b) { return (floats)((yes & (ints)a) | (~yes & (ints)b)); }

/* sum + a b, rounded once where the processor can. Compilers make none of their own (-ffp-contract=off): whether they
   would depends on what is around it, and a row's sum is to be the same beside any number of others. */
INLINE floats plus_product(floats sum, floats a, floats b) {
#if LANES == 16
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LANES == 8 && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}
INLINE float plus_product_of_one(float sum, float a, float b) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

INLINE float sum(floats v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    put(part, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
#endif
}

/* e^x to about one unit in the last place, from e^-87.3 to e^88.3 (what is outside gives these): 2^n times a
   polynomial on [-ln 2 / 2, ln 2 / 2], as in Cephes' expf. NaN stays NaN. */
INLINE floats exponential(floats x) {
    floats bounded = choose(x < all(-87.3f), all(-87.3f), x);
    bounded = choose(bounded > all(88.3f), all(88.3f), bounded);
    /* 1.5 * 2^23: rounds to whole numbers */
    floats shifted = plus_product(all(12582912.0f), bounded, all(1.44269504f));
    floats n = shifted - 12582912.0f;
    floats r = plus_product(bounded, n, all(-0.693359375f));
    r = plus_product(r, n, all(2.12194440e-4f));
    floats p = all(1.9875691500e-4f);
    p = plus_product(all(1.3981999507e-3f), p, r);
    p = plus_product(all(8.3334519073e-3f), p, r);
    p = plus_product(all(4.1665795894e-2f), p, r);
    p = plus_product(all(1.6666665459e-1f), p, r);
    p = plus_product(all(5.0000001201e-1f), p, r);
    p = plus_product(r, p * r, r) + 1.0f;
    ints power = __builtin_convertvector(n, ints) << 23;
    return choose(x == x, (floats)((ints)p + power), x);
}

INLINE floats sigmoid(floats x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE floats tangent(floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

/* x[i] = f(x[i]) for n numbers. */
#define EACH(name, f)                                            \
    static NOINLINE void name(float *x, int64_t n) {             \
        for (; n >= LANES; x += LANES, n -= LANES) put(x, f(get(x))); \
        float rest[LANES] = {0};                                 \
        for (int64_t i = 0; i < n; i++) rest[i] = x[i];          \
        put(rest, f(get(rest)));                                 \
        for (int64_t i = 0; i < n; i++) x[i] = rest[i];          \
    }

INLINE floats gate(floats x) { return x * sigmoid(x); }
INLINE floats decay(floats x) { return exponential(-exponential(x)); }
INLINE floats bounded_decay(floats x) { return exponential(-0.60653066f * sigmoid(x)); } /* e^-0.5 = 0.607 */
INLINE floats squared_relu(floats x) { return choose(x < (floats){0}, (floats){0}, x * x); }

EACH(each_sigmoid, sigmoid)
EACH(each_tangent, tangent)
EACH(each_gate, gate)
EACH(each_decay, decay)
EACH(each_bounded_decay, bounded_decay)
EACH(each_squared_relu, squared_relu)

/* Strong decays end in subnormal numbers, on which processors are slow: a thread takes them for zero meanwhile. */
INLINE uint64_t flush_subnormals(void) {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040);
    return before;
#else
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
    return before;
#endif
}

INLINE void restore(uint64_t before) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned)before);
#else
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#endif
}
