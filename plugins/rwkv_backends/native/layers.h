/* What the layers of all versions are made of. */

#pragma once
#include "matrix.h"

struct norm {
    const float *weight, *bias;
};

/* A tensor of the state, [layers, rows, ...]; what belongs to one row of one layer is contiguous. */
struct state {
    void *data;
    int64_t layer, row; /* strides in bytes */
    int64_t dtype;
};

INLINE void *state_at(const struct state *s, int64_t layer, int64_t row) {
    return (char *)s->data + layer * s->layer + row * s->row;
}

/* y = (x - mean) / sqrt(variance + eps). */
static NOINLINE void standardize(const float *x, float *y, int64_t n, float eps) {
    floats total = {0}, squares = {0};
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) total += get(x + i);
    if (whole < n) total += few_as(FLOAT32, x, whole, n - whole);
    float mean = sum(total) / (float)n;
    for (int64_t i = 0; i < whole; i += LANES) {
        floats v = get(x + i) - mean;
        squares += v * v;
    }
    float rest = 0;
    for (int64_t i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / __builtin_sqrtf((sum(squares) + rest) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale;
}

static NOINLINE void layer_norm(const struct norm *norm, const float *x, float *y, int64_t n) {
    standardize(x, y, n, 1e-5f);
    for (int64_t i = 0; i < n; i++) y[i] = y[i] * norm->weight[i] + norm->bias[i];
}

/* dx = prev - x, and x becomes prev. */
static NOINLINE void shift(int dtype, void *prev, const float *x, float *dx, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) put(dx + i, many_as(dtype, prev, i) - get(x + i));
    if (i < n) {
        float rest[LANES];
        put(rest, few_as(dtype, prev, i, n - i));
        for (int64_t j = i; j < n; j++) dx[j] = rest[j - i] - x[j];
    }
    for (i = 0; i < n; i++) put_as(dtype, prev, i, x[i]);
}

/* One row of a matrix, the embedding of a token. */
static NOINLINE void embedding(const struct matrix *m, int64_t row, float *x) {
    const char *from = (const char *)m->weight + row * m->cols * size_of(m->dtype);
    float scale = m->dtype == INT8 ? m->scale[row] : 1.0f, rest[LANES];
    int64_t i = 0;
    for (; i + LANES <= m->cols; i += LANES) put(x + i, many_as(m->dtype, from, i) * scale);
    put(rest, few_as(m->dtype, from, i, m->cols - i) * scale);
    for (int64_t j = i; j < m->cols; j++) x[j] = rest[j - i];
}

/* y = x + dx * mix. */
static NOINLINE void lerp(const float *x, const float *dx, const float *mix, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] + dx[i] * mix[i];
}
