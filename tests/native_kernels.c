/* The matrix kernels of the native backend, each callable by itself. */

#include "layers.h"

void times(const struct matrix *m, int64_t first, int64_t last, const float *x, int64_t n, float *out, float *packed) {
    multiply(m, first, last, x, n, out, packed);
}

void plus_columns(const struct matrix *m, int64_t top, int64_t rows, int64_t first, int64_t last, const float *x,
                  int64_t apart, int64_t n, float *out) {
    add_columns(m, top, rows, first, last, x, apart, n, out);
}

void row(const struct matrix *m, int64_t at, float *x) { embedding(m, at, x); }

void exchange(int64_t dtype, void *prev, const float *x, float *dx, int64_t n) { shift((int)dtype, prev, x, dx, n); }

EACH(each_exponential, exponential)

void functions(int64_t n, float *e, float *s, float *t, float *g, float *d, float *b, float *r) {
    each_exponential(e, n);
    each_sigmoid(s, n);
    each_tangent(t, n);
    each_gate(g, n);
    each_decay(d, n);
    each_bounded_decay(b, n);
    each_squared_relu(r, n);
}
