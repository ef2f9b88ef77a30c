/* Weight matrices of four types times a few float32 vectors: a matrix is read from memory once for all of them. */

#pragma once
#include "numbers.h"

struct matrix {
    const void *weight; /* [rows, cols] */
    const float *scale; /* [rows]: what rows of INT8 are multiplied with; NULL for the other types */
    int64_t rows, cols;
    int64_t dtype;
};

/* Rows of a matrix at a time, each with sums of its own, which hides the latency of an addition; and vectors at a
   time: all sums together take half of the registers. */
#define ROWS 4
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#if defined(__AVX512BF16__) && !defined(NO_BFLOAT16_DOT)
#define BFLOAT16_DOT
#endif
#define UNROLL _Pragma("GCC unroll 4")
/* The next rows go into the second-level cache ahead of use: a hardware prefetcher stops at the end of a page. */
#define FETCH(address) __builtin_prefetch(address, 0, 2)

typedef float partial[ROWS][VECTORS][LANES];

/* Between two vectors that are read side by side: off the powers of two, for such addresses share a cache's places. */
INLINE int64_t spread(int64_t cols) { return (cols + 31) / 32 * 32 + 32; }

/* ROWS rows w times B vectors x, `spread` apart and padded with zeros: sums by lane. B is a constant. */
INLINE void dots(int dtype, int B, const char *const *w, const float *x, int64_t n, partial out) {
    int64_t i = 0, size = size_of(dtype), next = ROWS * n * size, apart = spread(n);
    floats acc[ROWS][VECTORS], v[VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int b = 0; b < B; b++) acc[r][b] = (floats){0};
    for (; i + LANES <= n; i += LANES) {
        UNROLL for (int b = 0; b < B; b++) v[b] = get(x + b * apart + i);
        UNROLL for (int r = 0; r < ROWS; r++) {
            FETCH(w[r] + next + i * size);
            floats weight = many_as(dtype, w[r], i);
            UNROLL for (int b = 0; b < B; b++) acc[r][b] += weight * v[b];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int b = 0; b < B; b++) put(out[r][b], acc[r][b]);
    if (i < n)
        for (int r = 0; r < ROWS; r++) {
            floats weight = few_as(dtype, w[r], i, n - i);
            for (int b = 0; b < B; b++) put(out[r][b], get(out[r][b]) + weight * get(x + b * apart + i));
        }
}

#ifdef BFLOAT16_DOT
/* The same for bfloat16, with vectors rounded to it: an instruction does twice the work, and nothing is widened. */
INLINE void dots_bfloat16(int B, const char *const *w, const uint16_t *x, int64_t n, partial out) {
    int64_t i = 0, next = ROWS * n * 2, apart = spread(n);
    __m512 acc[ROWS][VECTORS];
    __m512bh v[VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    for (; i + 32 <= n; i += 32) {
        UNROLL for (int b = 0; b < B; b++) v[b] = (__m512bh)_mm512_loadu_si512(x + b * apart + i);
        UNROLL for (int r = 0; r < ROWS; r++) {
            FETCH(w[r] + next + i * 2);
            __m512bh weight = (__m512bh)_mm512_loadu_si512(w[r] + i * 2);
            UNROLL for (int b = 0; b < B; b++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], weight, v[b]);
        }
    }
    if (i < n) {
        __mmask32 there = (1u << (n - i)) - 1;
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(there, w[r] + i * 2);
            UNROLL for (int b = 0; b < B; b++)
                acc[r][b] = _mm512_dpbf16_ps(acc[r][b], weight, (__m512bh)_mm512_loadu_si512(x + b * apart + i));
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int b = 0; b < B; b++) _mm512_storeu_ps(out[r][b], acc[r][b]);
}
#endif

INLINE void block(int dtype, int B, const char *const *w, const void *x, int64_t first, int64_t n, partial out) {
#ifdef BFLOAT16_DOT
    if (dtype == BFLOAT16) {
        dots_bfloat16(B, w, (const uint16_t *)x + first * spread(n), n, out);
        return;
    }
#endif
    dots(dtype, B, w, (const float *)x + first * spread(n), n, out);
}

INLINE void rows_times(int dtype, const struct matrix *m, int64_t first, int64_t last, const void *x, int64_t n,
                       float *out) {
    int64_t pitch = m->cols * size_of(dtype);
    for (int64_t row = first; row < last; row += ROWS) {
        int rows = last - row < ROWS ? (int)(last - row) : ROWS;
        const char *w[ROWS];
        for (int r = 0; r < ROWS; r++) /* a block of fewer rows reads its last one again */
            w[r] = (const char *)m->weight + (row + (r < rows ? r : rows - 1)) * pitch;
        for (int64_t b = 0, size; b < n; b += size) {
            partial part;
            size = n - b >= VECTORS ? VECTORS : n - b >= 2 ? 2 : 1;
            if (size == VECTORS)
                block(dtype, VECTORS, w, x, b, m->cols, part);
            else if (size == 2)
                block(dtype, 2, w, x, b, m->cols, part);
            else
                block(dtype, 1, w, x, b, m->cols, part);
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < size; j++)
                    out[(b + j) * m->rows + row + r] =
                        sum(get(part[r][j])) * (dtype == INT8 ? m->scale[row + r] : 1.0f);
        }
    }
}

/* Room for the packed vectors that `multiply` takes, in numbers of float32. */
INLINE int64_t packed_size(int64_t cols, int64_t n) { return n * spread(cols); }

/* Rows first..last of a matrix times n vectors x [n, cols] -> those columns of out [n, rows]. */
static void multiply(const struct matrix *m, int64_t first, int64_t last, const float *x, int64_t n, float *out,
                     float *packed) {
    int64_t cols = m->cols, apart = spread(cols);
    if (first >= last) return;
    for (int64_t b = 0; b < n; b++)
        for (int64_t i = 0; i < apart; i++) {
            float value = i < cols ? x[b * cols + i] : 0.0f;
#ifdef BFLOAT16_DOT
            if (m->dtype == BFLOAT16) {
                ((uint16_t *)packed)[b * apart + i] = to_bfloat16(value);
                continue;
            }
#endif
            packed[b * apart + i] = value;
        }
    switch (m->dtype) {
    case FLOAT32: rows_times(FLOAT32, m, first, last, packed, n, out); break;
    case BFLOAT16: rows_times(BFLOAT16, m, first, last, packed, n, out); break;
    case FLOAT16: rows_times(FLOAT16, m, first, last, packed, n, out); break;
    default: rows_times(INT8, m, first, last, packed, n, out);
    }
}

/* G vectors of columns, B sums of rows each: w [rows, ...], x [B, rows]. G and B are constants. */
INLINE void columns(int dtype, int G, int B, const char *w, int64_t pitch, int64_t rows, const float *x, int64_t apart,
                    float *out, int64_t out_apart) {
    floats acc[4][VECTORS];
    UNROLL for (int g = 0; g < G; g++) UNROLL for (int b = 0; b < B; b++)
        acc[g][b] = get(out + b * out_apart + g * LANES);
    for (int64_t r = 0; r < rows; r++)
        UNROLL for (int g = 0; g < G; g++) {
            floats weight = many_as(dtype, w + r * pitch, g * LANES);
            UNROLL for (int b = 0; b < B; b++) acc[g][b] += weight * x[b * apart + r];
        }
    UNROLL for (int g = 0; g < G; g++) UNROLL for (int b = 0; b < B; b++)
        put(out + b * out_apart + g * LANES, acc[g][b]);
}

INLINE void columns_times(int dtype, const struct matrix *m, int64_t top, int64_t rows, int64_t first, int64_t last,
                          const float *x, int64_t apart, int64_t n, float *out) {
    int64_t c = first, b, pitch = m->cols * size_of(dtype);
    const char *w = (const char *)m->weight + top * pitch;
    for (; c + 4 * LANES <= last && n == 1; c += 4 * LANES)
        columns(dtype, 4, 1, w + c * size_of(dtype), pitch, rows, x, apart, out + c, m->cols);
    for (; c + LANES <= last; c += LANES) {
        for (b = 0; b + VECTORS <= n; b += VECTORS)
            columns(dtype, 1, VECTORS, w + c * size_of(dtype), pitch, rows, x + b * apart, apart, out + b * m->cols + c,
                    m->cols);
        for (; b < n; b++)
            columns(dtype, 1, 1, w + c * size_of(dtype), pitch, rows, x + b * apart, apart, out + b * m->cols + c,
                    m->cols);
    }
    if (c < last)
        for (b = 0; b < n; b++) {
            float rest[LANES] = {0};
            for (int64_t j = c; j < last; j++) rest[j - c] = out[b * m->cols + j];
            for (int64_t r = 0; r < rows; r++)
                put(rest, get(rest) + few_as(dtype, w + r * pitch, c, last - c) * x[b * apart + r]);
            for (int64_t j = c; j < last; j++) out[b * m->cols + j] = rest[j - c];
        }
}

/* out [n, cols] += x [n, rows], rows of it `apart`, times the rows top... of a matrix, which is not INT8: those
   columns from first to last. */
static NOINLINE void add_columns(const struct matrix *m, int64_t top, int64_t rows, int64_t first, int64_t last,
                                 const float *x, int64_t apart, int64_t n, float *out) {
    switch (m->dtype) {
    case FLOAT32: columns_times(FLOAT32, m, top, rows, first, last, x, apart, n, out); break;
    case BFLOAT16: columns_times(BFLOAT16, m, top, rows, first, last, x, apart, n, out); break;
    default: columns_times(FLOAT16, m, top, rows, first, last, x, apart, n, out);
    }
}
