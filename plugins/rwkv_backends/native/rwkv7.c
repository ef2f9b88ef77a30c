/* One decode step of RWKV-7: the same arithmetic as rwkv_layers/rwkv7.py for T = 1, in float32 throughout. */

#include "layers.h"

enum { R, W, K, V, A, G };                       /* mixtures of the input with the one before it */
enum { DECAY, RATE, VALUE_MIX, GATE, ADAPTERS }; /* low-rank adapters */

struct layer {
    struct norm ln1, ln2;
    const float *shift;           /* [6, C]: r, w, k, v, a, g */
    struct matrix down[ADAPTERS]; /* [rank, C] each; the first layer has no VALUE_MIX: no rows */
    struct matrix up[ADAPTERS];   /* [C, rank] */
    const float *base[GATE];      /* [C] each; the gate has none */
    const float *removal, *replacement, *bonus; /* [C] */
    struct matrix rkv[3];                       /* [C, C] each */
    struct norm ln_x;                           /* [C] */
    struct matrix output;                       /* [C, C] */
    const float *ffn_shift;                     /* [C] */
    struct matrix key;                          /* [F, C] */
    struct matrix value;                        /* [C, F] */
};

/* Everything between the products, [B, ...] each; `mixed`, `low`, `rkv` and `adapted` one part after the other. */
struct scratch {
    float *x, *y, *dx, *mixed, *low, *rkv, *adapted, *v_first, *out, *key, *packed;
    int64_t packed_size; /* of one thread */
};

#include "step.h"

static const int mixture_of_down[] = {W, A, V, G}, mixture_of_rkv[] = {R, K, V};

static int64_t ranks(const struct layer *layer) {
    int64_t all = 0;
    for (int j = 0; j < ADAPTERS; j++) all += layer->down[j].rows;
    return all;
}

static int64_t lay_out(const struct model *m, int64_t B, int threads, float *start, struct scratch *s) {
    const struct layer *layer = m->layer + m->layers - 1; /* not the first, which has an adapter less */
    int64_t C = m->heads * m->size, F = layer->key.rows;
    const struct buffer buffers[] = {
        {&s->x, C}, {&s->y, C}, {&s->dx, C}, {&s->mixed, 6 * C}, {&s->low, ranks(layer)}, {&s->rkv, 3 * C},
        {&s->adapted, ADAPTERS * C}, {&s->v_first, C}, {&s->out, C}, {&s->key, F},
    };
    int64_t used = place(buffers, sizeof buffers, B, start);
    s->packed = start + used;
    s->packed_size = packed_size(most(C, most(F, ranks(layer))), B);
    return used + threads * s->packed_size;
}

static void before_attention(const struct step *p, int64_t i, int64_t b) {
    const struct layer *layer = p->model->layer + i;
    int64_t C = p->model->heads * p->model->size;
    float *y = p->s.y + b * C, *dx = p->s.dx + b * C;
    layer_norm(&layer->ln1, p->s.x + b * C, y, C);
    shift((int)p->att_x.dtype, state_at(&p->att_x, i, b), y, dx, C);
    for (int64_t j = R; j <= G; j++) lerp(y, dx, layer->shift + j * C, p->s.mixed + (j * p->B + b) * C, C);
}

/* The first half of the adapters and the three large matrices, each on its own mixture; a share of all their rows. */
static void project(const struct step *p, const struct layer *layer, struct share mine, float *packed) {
    int64_t C = p->model->heads * p->model->size, B = p->B, start = 0;
    for (int j = 0; j < ADAPTERS; j++) {
        int64_t rank = layer->down[j].rows;
        struct share s = within(mine, start, rank);
        float *low = p->s.low + start * B;
        multiply(layer->down + j, s.from, s.to, p->s.mixed + mixture_of_down[j] * B * C, B, low, packed);
        for (int64_t b = 0; b < B; b++) {
            if (j == DECAY) each_tangent(low + b * rank + s.from, s.to - s.from);
            if (j == GATE) each_sigmoid(low + b * rank + s.from, s.to - s.from);
        }
        start += rank;
    }
    for (int j = 0; j < 3; j++) {
        struct share s = within(mine, start + j * C, C);
        multiply(layer->rkv + j, s.from, s.to, p->s.mixed + mixture_of_rkv[j] * B * C, B, p->s.rkv + j * B * C, packed);
    }
}

/* The second half of the adapters: columns from..to of all four. */
static void adapt(const struct step *p, const struct layer *layer, int64_t from, int64_t to, float *packed) {
    int64_t C = p->model->heads * p->model->size, B = p->B;
    const float *low = p->s.low;
    for (int j = 0; j < ADAPTERS; low += B * layer->down[j].rows, j++) {
        float *all = p->s.adapted + j * B * C;
        if (layer->up[j].rows == 0) continue;
        multiply(layer->up + j, from, to, low, B, all, packed);
        if (j == GATE) continue;
        for (int64_t b = 0; b < B; b++) {
            float *out = all + b * C;
            for (int64_t c = from; c < to; c++) out[c] += layer->base[j][c];
            (j == DECAY ? each_bounded_decay : each_sigmoid)(out + from, to - from);
        }
    }
}

/* S = (diag(w) - kappa rate kappa^T) S + k v, o = r S, for one head: S [N, N], all others [N]. */
static void wkv(const float *r, const float *w, const float *k, const float *v, const float *kappa, const float *rate,
                float *restrict seen, float *restrict S, float *restrict o, int64_t N) {
    for (int64_t j = 0; j < N; j++) seen[j] = o[j] = 0;
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) seen[j] = plus_product_of_one(seen[j], -kappa[i], S[i * N + j]);
    for (int64_t i = 0; i < N; i++) {
        float back = kappa[i] * rate[i];
        for (int64_t j = 0; j < N; j++) {
            float now = plus_product_of_one(plus_product_of_one(w[i] * S[i * N + j], back, seen[j]), k[i], v[j]);
            S[i * N + j] = now;
            o[j] = plus_product_of_one(o[j], r[i], now);
        }
    }
}

/* kappa = k removal, of length 1, and k (1 + (rate - 1) replacement) in the place of k; gives r k bonus summed up. */
static float keys(const float *r, float *k, const float *rate, const struct layer *layer, int64_t at, float *kappa,
                  int64_t N) {
    float squares = 0, strength = 0;
    for (int64_t c = 0; c < N; c++) {
        kappa[c] = k[c] * layer->removal[at + c];
        squares += kappa[c] * kappa[c];
        k[c] *= 1.0f + (rate[c] - 1.0f) * layer->replacement[at + c];
        strength += r[c] * k[c] * layer->bonus[at + c];
    }
    float length = __builtin_sqrtf(squares);
    length = length < 1e-12f ? 1e-12f : length;
    for (int64_t c = 0; c < N; c++) kappa[c] /= length;
    return strength;
}

/* The recurrence, its norm, the bonus and the gate, for a share of the heads. Their output takes the place of the
   first mixture, kappa that of `y`, and what the state holds under it that of `dx`: all are done with. */
static void attend(const struct step *p, int64_t i, struct share heads, float *packed) {
    const struct layer *layer = p->model->layer + i;
    int64_t N = p->model->size, C = p->model->heads * N, B = p->B, from = heads.from * N, to = heads.to * N;
    adapt(p, layer, from, to, packed);
    for (int64_t b = 0; b < B; b++) {
        float *rkv[3], *adapted[ADAPTERS], *out = p->s.mixed + b * C, *first = p->s.v_first + b * C;
        float *kappa = p->s.y + b * C, *seen = p->s.dx + b * C;
        for (int j = 0; j < 3; j++) rkv[j] = p->s.rkv + (j * B + b) * C;
        for (int j = 0; j < ADAPTERS; j++) adapted[j] = p->s.adapted + (j * B + b) * C;
        float *r = rkv[0], *k = rkv[1], *v = rkv[2], *rate = adapted[RATE];
        for (int64_t c = from; c < to; c++) {
            if (i == 0)
                first[c] = v[c];
            else
                v[c] += (first[c] - v[c]) * adapted[VALUE_MIX][c];
        }
        for (int64_t at = from; at < to; at += N) {
            float *S = (float *)state_at(&p->att_kv, i, b) + at * N;
            float strength = keys(r + at, k + at, rate + at, layer, at, kappa + at, N);
            wkv(r + at, adapted[DECAY] + at, k + at, v + at, kappa + at, rate + at, seen + at, S, out + at, N);
            standardize(out + at, out + at, N, 64e-5f);
            for (int64_t c = at; c < at + N; c++) {
                float normed = out[c] * layer->ln_x.weight[c] + layer->ln_x.bias[c];
                out[c] = (normed + strength * v[c]) * adapted[GATE][c];
            }
        }
    }
}

static void before_ffn(const struct step *p, int64_t i, int64_t b) {
    const struct layer *layer = p->model->layer + i;
    int64_t C = p->model->heads * p->model->size;
    float *y = p->s.y + b * C, *dx = p->s.dx + b * C;
    layer_norm(&layer->ln2, p->s.x + b * C, y, C);
    shift((int)p->ffn_x.dtype, state_at(&p->ffn_x, i, b), y, dx, C);
    lerp(y, dx, layer->ffn_shift, p->s.mixed + b * C, C);
}

static void layer_step(const struct step *p, int64_t i, int thread) {
    const struct layer *layer = p->model->layer + i;
    int64_t H = p->model->heads, C = H * p->model->size, F = layer->key.rows, B = p->B;
    float *packed = p->s.packed + thread * p->s.packed_size;
    struct share rows = share_of(B, 1, thread, p->threads), columns = share_of(C, 16, thread, p->threads), s;

    for (int64_t b = rows.from; b < rows.to; b++) before_attention(p, i, b);
    meet(p->barrier, p->threads);
    project(p, layer, share_of(ranks(layer) + 3 * C, 16, thread, p->threads), packed);
    meet(p->barrier, p->threads);
    attend(p, i, share_of(H, 1, thread, p->threads), packed);
    meet(p->barrier, p->threads);
    multiply(&layer->output, columns.from, columns.to, p->s.mixed, B, p->s.out, packed);
    add(p, 0, 1.0f, columns);
    meet(p->barrier, p->threads);
    for (int64_t b = rows.from; b < rows.to; b++) before_ffn(p, i, b);
    meet(p->barrier, p->threads);
    s = share_of(F, 16, thread, p->threads);
    multiply(&layer->key, s.from, s.to, p->s.mixed, B, p->s.key, packed);
    for (int64_t b = 0; b < B; b++) each_squared_relu(p->s.key + b * F + s.from, s.to - s.from);
    meet(p->barrier, p->threads);
    multiply(&layer->value, columns.from, columns.to, p->s.key, B, p->s.out, packed);
    add(p, 0, 1.0f, columns);
    meet(p->barrier, p->threads);
}

EXPORT(rwkv7)
