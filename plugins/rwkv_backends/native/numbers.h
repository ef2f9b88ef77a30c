/* The types that weights and states are kept in, read as float32 one at a time or a vector at a time. */

#pragma once
#include "vector.h"

enum dtype { FLOAT32, BFLOAT16, FLOAT16, INT8 };

INLINE float as_float(uint32_t i) {
    union { uint32_t i; float f; } u = {i};
    return u.f;
}

INLINE uint32_t as_bits(float f) {
    union { float f; uint32_t i; } u = {f};
    return u.i;
}

INLINE uint16_t to_bfloat16(float x) { /* to nearest, ties to even */
    uint32_t i = as_bits(x);
    return x != x ? 0x7fc0 : (uint16_t)((i + 0x7fff + (i >> 16 & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) { /* to nearest, ties to even */
#ifdef __F16C__
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t i = as_bits(x), sign = i >> 16 & 0x8000;
    i &= 0x7fffffff;
    if (i > 0x7f800000) return sign | 0x7e00;
    if (i >= 0x477ff000) return sign | 0x7c00;
    if (i < 0x38800000) return sign | (as_bits(as_float(i) + 0.5f) - 0x3f000000);
    return sign | ((i + 0xfff + (i >> 13 & 1) - (112u << 23)) >> 13);
#endif
}

INLINE floats many_float16(shorts x) {
#if LANES == 16
    return (floats)_mm512_cvtph_ps((__m256i)x);
#elif LANES == 8 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)x);
#else
    words wide = __builtin_convertvector(x, words), i = (wide & 0x7fff) << 13;
    floats small = (floats)(i + (113u << 23)) - 0x1p-14f;
    floats f = choose((ints)(i < 0x00800000), small, (floats)(i + (112u << 23)));
    f = choose((ints)(i >= 0x0f800000), (floats)(i + (224u << 23)), f);
    return (floats)((words)f | (wide & 0x8000) << 16);
#endif
}

/* Numbers i... of an array of some type. */
INLINE floats many_as(int dtype, const void *p, int64_t i) {
    switch (dtype) {
    case FLOAT32: return get((const float *)p + i);
    case BFLOAT16: return (floats)(__builtin_convertvector(*(const shorts_at *)((const uint16_t *)p + i), words) << 16);
    case FLOAT16: return many_float16(*(const shorts_at *)((const uint16_t *)p + i));
    default:
#if LANES == 16
        return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)((const char *)p + i))));
#else
        return __builtin_convertvector(*(const bytes_at *)((const int8_t *)p + i), floats);
#endif
    }
}

INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }

/* Numbers i... of which only `count` are there: the others are 0. */
static __attribute__((noinline)) floats few_as(int dtype, const void *p, int64_t i, int64_t count) {
    char padded[4 * LANES] = {0};
    const char *from = (const char *)p + i * size_of(dtype);
    for (int64_t j = 0; j < count * size_of(dtype); j++) padded[j] = from[j];
    return many_as(dtype, padded, 0);
}

/* The same as to_bfloat16, for many. */
INLINE void put_bfloat16(uint16_t *p, floats x) {
    words i = (words)x, rounded = (i + 0x7fff + (i >> 16 & 1)) >> 16;
    rounded = (words)choose(x == x, (floats)rounded, (floats)((words){0} + 0x7fc0));
    *(shorts_at *)p = __builtin_convertvector(rounded, shorts);
}

/* Stores a number as its type keeps it; states are never INT8. */
INLINE void put_as(int dtype, void *p, int64_t i, float x) {
    switch (dtype) {
    case FLOAT32: ((float *)p)[i] = x; break;
    case BFLOAT16: ((uint16_t *)p)[i] = to_bfloat16(x); break;
    default: ((uint16_t *)p)[i] = to_float16(x);
    }
}
