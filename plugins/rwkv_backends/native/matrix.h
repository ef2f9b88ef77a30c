/* Weight matrices of four types times a few float32 vectors: a matrix is read from memory once for all of them. */

#pragma once
#include "numbers.h"

struct matrix {
    const void *weight; /* [rows, cols] */
    const float *scale; /* [rows]: what rows of INT8 are multiplied with; NULL for the other types */
    int64_t rows, cols;
    int64_t dtype;
};

/* Memory gives out most when it is read from one end to the other, so a row is read after the other. It is asked for
   ahead of use, as a hardware prefetcher stops at the end of a page. */
#define LINE 64 /* bytes of a cache's line */
#define AHEAD 4096
#define FETCH(address) __builtin_prefetch(address, 0, 2)
/* Vectors that take more than NEAR bytes do not stay in the first-level cache from row to row: then GROUP rows that
   wait in the second-level cache are multiplied, TILE bytes of each at a time, with the part of the vectors that
   belongs to these. */
#define NEAR (32 << 10)
#define GROUP 8
#define TILE 2048
#define MOST 16 /* vectors */
/* A row's sum is made of several, of every fourth line each, which hides the latency of an addition. */
#define SUMS 4
/* Vectors at a time: all sums together take half of the registers. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define UNROLL _Pragma("GCC unroll 4")

typedef float partial[SUMS][LANES];

/* Between two vectors that are read side by side: off the powers of two, for such addresses share a cache's places. */
INLINE int64_t spread(int64_t cols) { return (cols + 31) / 32 * 32 + 32; }

/* bfloat16 is multiplied in pairs where the processor can, with vectors rounded to it: an instruction does twice the
   work, and nothing is widened. Every other type is widened to float32. */
#if defined(__AVX512BF16__) && !defined(NO_BFLOAT16_DOT)
INLINE int in_pairs(int dtype) { return dtype == BFLOAT16; }
INLINE floats plus_pairs(floats sum, floats a, floats b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE floats few_pairs(const char *w, int64_t count) {
    return (floats)_mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, w);
}
#else
INLINE int in_pairs(int dtype) { return 0; }
INLINE floats plus_pairs(floats sum, floats a, floats b) { return sum; }
INLINE floats few_pairs(const char *w, int64_t count) { return (floats){0}; }
#endif

/* Numbers that are multiplied at once, weights and vectors as `plus` takes them, and sum + weights * vector. */
INLINE int64_t at_once(int dtype) { return in_pairs(dtype) ? 2 * LANES : LANES; }
INLINE floats weights_at(int dtype, const char *w, int64_t i) {
    return in_pairs(dtype) ? get((const float *)(w + 2 * i)) : many_as(dtype, w, i);
}
INLINE floats few_weights_at(int dtype, const char *w, int64_t i, int64_t count) {
    if (in_pairs(dtype)) return few_pairs(w + 2 * i, count);
    return count < LANES ? few_as(dtype, w, i, count) : many_as(dtype, w, i);
}
INLINE floats vector_at(int dtype, const char *x, int64_t i) {
    return get((const float *)(x + i * (in_pairs(dtype) ? 2 : 4)));
}
INLINE floats plus(int dtype, floats sum, floats weights, floats vector) {
    return in_pairs(dtype) ? plus_pairs(sum, weights, vector) : sum + weights * vector;
}

/* Numbers i..n of a row w times B vectors x, `apart` bytes apart and padded with zeros: sums [B, SUMS] by lane, to
   which they are added unless they are the first. As many lines from `ahead` are asked for. B is a constant. */
INLINE void block(int dtype, int B, const char *w, const char *ahead, const char *x, int64_t apart, int64_t i,
                  int64_t n, int more, partial *sums) {
    const int64_t line = LINE / size_of(dtype), once = at_once(dtype);
    floats acc[SUMS][VECTORS];
    UNROLL for (int s = 0; s < SUMS; s++) UNROLL for (int b = 0; b < B; b++)
        acc[s][b] = more ? get(sums[b][s]) : (floats){0};
    for (; i + SUMS * line <= n; i += SUMS * line, ahead += SUMS * LINE)
        UNROLL for (int s = 0; s < SUMS; s++) {
            FETCH(ahead + s * LINE);
            UNROLL for (int64_t j = i + s * line; j < i + (s + 1) * line; j += once) {
                floats weights = weights_at(dtype, w, j);
                UNROLL for (int b = 0; b < B; b++)
                    acc[s][b] = plus(dtype, acc[s][b], weights, vector_at(dtype, x + b * apart, j));
            }
        }
    if (i < n)
        UNROLL for (int s = 0; s < SUMS; s++, i += line)
            for (int64_t j = i; j < n && j < i + line; j += once) {
                floats weights = few_weights_at(dtype, w, j, n - j);
                UNROLL for (int b = 0; b < B; b++)
                    acc[s][b] = plus(dtype, acc[s][b], weights, vector_at(dtype, x + b * apart, j));
            }
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int s = 0; s < SUMS; s++) put(sums[b][s], acc[s][b]);
}

INLINE void blocks(int dtype, const char *w, const char *ahead, const char *x, int64_t apart, int64_t i, int64_t end,
                   int more, int64_t n, partial *sums) {
    for (int64_t b = 0, size; b < n; b += size) {
        size = n - b >= VECTORS ? VECTORS : n - b >= 2 ? 2 : 1;
        if (size == VECTORS)
            block(dtype, VECTORS, w, ahead, x + b * apart, apart, i, end, more, sums + b);
        else if (size == 2)
            block(dtype, 2, w, ahead, x + b * apart, apart, i, end, more, sums + b);
        else
            block(dtype, 1, w, ahead, x + b * apart, apart, i, end, more, sums + b);
    }
}

INLINE float total(const partial *s) {
    return sum((get((*s)[0]) + get((*s)[1])) + (get((*s)[2]) + get((*s)[3])));
}

INLINE void rows_times(int dtype, const struct matrix *m, int64_t first, int64_t last, const char *x, int64_t n,
                       float *out) {
    int64_t size = size_of(dtype), pitch = m->cols * size, apart = spread(m->cols) * (in_pairs(dtype) ? 2 : 4);
    int near = n * apart <= NEAR;
    int64_t group = near ? 1 : GROUP, tile = near ? m->cols : TILE / size;
    for (int64_t row = first; row < last; row += group) {
        int64_t rows = last - row < group ? last - row : group;
        const char *w = (const char *)m->weight + row * pitch, *ahead = w + (near ? AHEAD : group * pitch);
        partial sums[GROUP * MOST]; /* [rows, n] */
        for (int64_t i = 0; i < m->cols; i += tile) {
            int64_t end = i + tile < m->cols ? i + tile : m->cols;
            for (int64_t r = 0; r < rows; r++, ahead += (end - i) * size)
                blocks(dtype, w + r * pitch, ahead, x, apart, i, end, i > 0, n, sums + r * n);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t b = 0; b < n; b++)
                out[b * m->rows + row + r] = total(sums + r * n + b) * (dtype == INT8 ? m->scale[row + r] : 1.0f);
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
            if (in_pairs((int)m->dtype))
                ((uint16_t *)packed)[b * apart + i] = to_bfloat16(value);
            else
                packed[b * apart + i] = value;
        }
    switch (m->dtype) {
    case FLOAT32: rows_times(FLOAT32, m, first, last, (const char *)packed, n, out); break;
    case BFLOAT16: rows_times(BFLOAT16, m, first, last, (const char *)packed, n, out); break;
    case FLOAT16: rows_times(FLOAT16, m, first, last, (const char *)packed, n, out); break;
    default: rows_times(INT8, m, first, last, (const char *)packed, n, out);
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
