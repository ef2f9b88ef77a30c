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
   ahead of use, as a hardware prefetcher stops at the end of a page and is late where a row takes long: straight into
   the first-level cache, as it is read once. */
#define LINE 64 /* bytes of a cache's line */
#define AHEAD 8192
#define FETCH(address, again) (again ? __builtin_prefetch(address, 0, 2) : __builtin_prefetch(address, 0, 0))
/* Vectors that take up to NEAR bytes stay in the first-level cache from row to row. Of larger ones, half of that is
   multiplied with its part of each row, then the next. */
#define NEAR (32 << 10)
/* Where there are more vectors than registers for their sums, as many bytes of rows wait in the second-level cache. */
#define GROUP (256 << 10)
#define MOST 8 /* vectors at a time */
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 16 /* for sums: half of all */
#else
#define REGISTERS 8
#endif
#define UNROLL _Pragma("GCC unroll 8")

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

/* Numbers that are multiplied at once, weights as `plus` takes them, and sum + weights * vector. */
INLINE int64_t at_once(int dtype) { return in_pairs(dtype) ? 2 * LANES : LANES; }
INLINE floats weights_at(int dtype, const char *w, int64_t i) {
    return in_pairs(dtype) ? get((const float *)(w + 2 * i)) : many_as(dtype, w, i);
}
INLINE floats few_weights_at(int dtype, const char *w, int64_t i, int64_t count) {
    if (in_pairs(dtype)) return few_pairs(w + 2 * i, count);
    return count < LANES ? few_as(dtype, w, i, count) : many_as(dtype, w, i);
}
INLINE floats plus(int dtype, floats sum, floats weights, floats vector) {
    return in_pairs(dtype) ? plus_pairs(sum, weights, vector) : plus_product(sum, weights, vector);
}

/* A row's sum is made of the sums of units of it, whatever the number of vectors. Each of these is made of several, of
   every other line or of every fourth, which hides the latency of an addition. */
INLINE int64_t width_of(int dtype) { return in_pairs(dtype) ? 2 : 4; } /* of a number, in bytes */
INLINE int64_t unit_of(int dtype) { return NEAR / 2 / MOST / width_of(dtype); }
INLINE int sums_of(int dtype) { return dtype == INT8 ? 4 : 2; }

/* How many of n vectors are multiplied side by side, filled up with zeros where there are fewer. */
INLINE int together(int dtype, int64_t n) {
    int all = n > 4 ? 8 : n > 2 ? 4 : (int)n, most = REGISTERS / sums_of(dtype);
    return all < most ? all : most;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct part {
    int64_t first, last; /* rows */
    int64_t from, to;    /* columns */
    int64_t ahead;       /* bytes from what is read to what is asked for */
    int again;           /* whether it is read again soon */
};

/* A part of a matrix times n vectors x [columns / at_once, B, at_once] -> out [n, rows], to which columns that are not
   the first are added. B is a constant, n at most as many. */
INLINE void part_times(int dtype, int B, const struct matrix *m, const struct part *p, const float *x, int64_t n,
                       float *out) {
    const int64_t line = LINE / size_of(dtype), once = at_once(dtype), unit = unit_of(dtype);
    const int S = sums_of(dtype);
    for (int64_t row = p->first; row < p->last; row++) {
        const char *w = (const char *)m->weight + (row * m->cols + p->from) * size_of(dtype);
        const float *v = x;
        for (int64_t start = p->from, left; start < p->to; start += unit) {
            floats acc[MOST][4];
            UNROLL for (int b = 0; b < B; b++) UNROLL for (int s = 0; s < S; s++) acc[b][s] = (floats){0};
            for (left = least(unit, p->to - start); left >= S * line; left -= S * line, w += S * LINE)
                UNROLL for (int s = 0; s < S; s++) {
                    FETCH(w + p->ahead + s * LINE, p->again);
                    UNROLL for (int64_t i = s * line; i < (s + 1) * line; i += once, v += B * LANES) {
                        floats weights = weights_at(dtype, w, i);
                        UNROLL for (int b = 0; b < B; b++)
                            acc[b][s] = plus(dtype, acc[b][s], weights, get(v + b * LANES));
                    }
                }
            for (int64_t i = 0; i < left; i += once, v += B * LANES) {
                floats weights = few_weights_at(dtype, w, i, left - i);
                UNROLL for (int b = 0; b < B; b++) acc[b][0] = plus(dtype, acc[b][0], weights, get(v + b * LANES));
            }
            float scale = dtype == INT8 ? m->scale[row] : 1.0f;
            UNROLL for (int b = 0; b < B; b++) {
                floats all = acc[b][0] + acc[b][1];
                if (S == 4) all += acc[b][2] + acc[b][3];
                float total = sum(all) * scale, *to = out + b * m->rows + row;
                if (b < n) *to = start ? *to + total : total;
            }
        }
    }
}

/* By type and by 1, 2, 4 or 8 vectors. */
typedef void times_part(const struct matrix *m, const struct part *p, const float *x, int64_t n, float *out);
#define TIMES(dtype, B)                                                                                   \
    static void dtype##_times_##B(const struct matrix *m, const struct part *p, const float *x, int64_t n, \
                                  float *out) {                                                            \
        part_times(dtype, B, m, p, x, n, out);                                                             \
    }
#define TIMES_ALL(dtype) TIMES(dtype, 1) TIMES(dtype, 2) TIMES(dtype, 4) TIMES(dtype, 8)
TIMES_ALL(FLOAT32)
TIMES_ALL(BFLOAT16)
TIMES_ALL(FLOAT16)
TIMES_ALL(INT8)
#define NAMES(dtype) {dtype##_times_1, dtype##_times_2, dtype##_times_4, dtype##_times_8}
static times_part *const times_of[4][4] = {NAMES(FLOAT32), NAMES(BFLOAT16), NAMES(FLOAT16), NAMES(INT8)};

/* Columns of packed vectors, and the room that `multiply` needs for these, in numbers of float32. */
INLINE int64_t spread(int64_t cols) { return (cols + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
INLINE int64_t packed_size(int64_t cols, int64_t n) { return (n > 2 ? (n + 7) / 4 * 4 : n) * spread(cols); }

/* n vectors x [n, cols] -> [cols / at_once, B, at_once], zeros where there is nothing. */
static NOINLINE void pack(int dtype, const float *x, int64_t cols, int64_t n, int64_t B, float *packed) {
    int64_t once = at_once(dtype);
    for (int64_t i = 0; i < spread(cols); i += LANES)
        for (int64_t b = 0; b < B; b++) {
            const float *from = x + b * cols + i;
            int64_t to = (i / once * B + b) * once + i % once;
            floats v = {0};
            if (b < n && i < cols) v = i + LANES <= cols ? get(from) : few_as(FLOAT32, from, 0, cols - i);
            if (in_pairs(dtype))
                put_bfloat16((uint16_t *)packed + to, v);
            else
                put(packed + to, v);
        }
}

/* Those rows of a matrix times n vectors, which are packed for B at a time. */
static void rows_times(const struct matrix *m, int64_t first, int64_t last, const float *x, int64_t n, int64_t B,
                       int again, float *out) {
    int dtype = (int)m->dtype;
    int64_t unit = unit_of(dtype), fit = NEAR / B / width_of(dtype), pitch = m->cols * size_of(dtype);
    int whole = m->cols <= fit;
    int64_t cols = whole ? m->cols : fit < 2 * unit ? unit : fit / 2 / unit * unit;
    int64_t ahead = whole ? AHEAD : pitch * (1 + AHEAD / (cols * size_of(dtype)));
    for (int64_t from = 0; from < m->cols; from += cols) {
        struct part part = {first, last, from, least(from + cols, m->cols), ahead, again};
        times_of[dtype][B == 8 ? 3 : B / 2](m, &part, x + from * B * width_of(dtype) / 4, n, out);
    }
}

/* Rows first..last of a matrix times n vectors x [n, cols] -> those columns of out [n, rows]. */
static void multiply(const struct matrix *m, int64_t first, int64_t last, const float *x, int64_t n, float *out,
                     float *packed) {
    int dtype = (int)m->dtype, again = n > together(dtype, n);
    int64_t size = spread(m->cols) * width_of(dtype) / 4, B;
    if (first >= last || !m->cols) return;
    int64_t group = again ? 1 + GROUP / (m->cols * size_of(dtype)) : last - first;
    for (int64_t b = 0; b < n; b += B) {
        B = together(dtype, n - b);
        pack(dtype, x + b * m->cols, m->cols, n - b, B, packed + b * size);
    }
    for (int64_t row = first; row < last; row += group)
        for (int64_t b = 0; b < n; b += B) {
            B = together(dtype, n - b);
            rows_times(m, row, least(row + group, last), packed + b * size, least(n - b, B), B, again,
                       out + b * m->rows);
        }
}

/* Sums of vectors of columns at a time. */
#define VECTORS (REGISTERS / 4)

/* G vectors of columns, B sums of rows each: w [rows, ...], x [B, rows]. G and B are constants. */
INLINE void columns(int dtype, int G, int B, const char *w, int64_t pitch, int64_t rows, const float *x, int64_t apart,
                    float *out, int64_t out_apart) {
    floats acc[4][VECTORS];
    UNROLL for (int g = 0; g < G; g++) UNROLL for (int b = 0; b < B; b++)
        acc[g][b] = get(out + b * out_apart + g * LANES);
    for (int64_t r = 0; r < rows; r++)
        UNROLL for (int g = 0; g < G; g++) {
            floats weight = many_as(dtype, w + r * pitch, g * LANES);
            UNROLL for (int b = 0; b < B; b++) acc[g][b] = plus_product(acc[g][b], weight, all(x[b * apart + r]));
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
                put(rest, plus_product(get(rest), few_as(dtype, w + r * pitch, c, last - c), all(x[b * apart + r])));
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
