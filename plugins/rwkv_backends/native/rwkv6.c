/* One decode step of RWKV-6: the same arithmetic as rwkv_layers/rwkv6.py for T = 1, in float32 throughout. */

#include "layers.h"

struct layer {
    struct norm ln1, ln2;
    const float *maa_x;     /* [C] */
    struct matrix maa_w1;   /* [5R, C] */
    struct matrix maa_w2;   /* [5R, C]: columns of it are summed up */
    const float *maa;       /* [5, C]: w, k, v, r, g */
    struct matrix decay_w1; /* [D, C] */
    struct matrix decay_w2; /* [C, D] */
    const float *decay;     /* [C] */
    const float *bonus;     /* [C] */
    struct matrix kvrg[4];  /* [C, C] each */
    struct norm ln_x;       /* [C] */
    struct matrix output;   /* [C, C] */
    const float *ffn_maa_k, *ffn_maa_r; /* [C] */
    struct matrix key;                  /* [F, C] */
    struct matrix receptance;           /* [C, C] */
    struct matrix value;                /* [C, F] */
};

/* Everything between the products, [B, ...] each. */
struct scratch {
    float *x, *y, *dx, *mixed, *lora, *low, *kvrg, *decay, *out, *key, *receptance, *packed;
    int64_t packed_size; /* of one thread */
};

#include "prompt6.h"
#include "step.h"

static int64_t lay_out(const struct model *m, int64_t B, int threads, float *start, struct scratch *s) {
    const struct layer *layer = m->layer;
    int64_t C = m->heads * m->size, F = layer->key.rows;
    const struct buffer buffers[] = {
        {&s->x, C}, {&s->y, C}, {&s->dx, C}, {&s->mixed, 5 * C}, {&s->lora, layer->maa_w1.rows},
        {&s->low, layer->decay_w1.rows}, {&s->kvrg, 4 * C}, {&s->decay, C}, {&s->out, C}, {&s->key, F},
        {&s->receptance, C},
    };
    int64_t used = place(buffers, sizeof buffers, B, start);
    s->packed = start + used;
    s->packed_size = packed_size(most(C, most(F, layer->decay_w1.rows)), B);
    return used + threads * s->packed_size;
}

/* What attention's products read: the normed input, and its way to the last one's. */
static void before_attention(const struct step *p, int64_t i, int64_t b) {
    const struct layer *layer = p->model->layer + i;
    int64_t C = p->model->heads * p->model->size;
    float *y = p->s.y + b * C, *dx = p->s.dx + b * C;
    layer_norm(&layer->ln1, p->s.x + b * C, y, C);
    shift((int)p->att_x.dtype, state_at(&p->att_x, i, b), y, dx, C);
    lerp(y, dx, layer->maa_x, p->s.mixed + b * C, C);
}

/* mixed = y + dx * (maa + lora maa_w2), for a share of the columns of all five. */
static void mix(const struct step *p, const struct layer *layer, struct share mine) {
    int64_t C = p->model->heads * p->model->size, R = layer->maa_w1.rows / 5, B = p->B;
    for (int64_t part = 0; part < 5; part++) {
        struct share s = within(mine, part * C, C);
        float *mixed = p->s.mixed + part * B * C;
        for (int64_t b = 0; b < B; b++)
            for (int64_t c = s.from; c < s.to; c++) mixed[b * C + c] = layer->maa[part * C + c];
        add_columns(&layer->maa_w2, part * R, R, s.from, s.to, p->s.lora + part * R, 5 * R, B, mixed);
        for (int64_t b = 0; b < B; b++) {
            int64_t at = b * C + s.from;
            lerp(p->s.y + at, p->s.dx + at, mixed + at, mixed + at, s.to - s.from);
        }
    }
}

/* decay's adapter and the four large matrices, each on its own mixture; a share of all their rows. */
static void project(const struct step *p, const struct layer *layer, struct share mine, float *packed) {
    int64_t C = p->model->heads * p->model->size, D = layer->decay_w1.rows, B = p->B;
    struct share s = within(mine, 0, D);
    multiply(&layer->decay_w1, s.from, s.to, p->s.mixed, B, p->s.low, packed);
    for (int64_t b = 0; b < B; b++) each_tangent(p->s.low + b * D + s.from, s.to - s.from);
    for (int64_t j = 0; j < 4; j++) {
        s = within(mine, D + j * C, C);
        multiply(layer->kvrg + j, s.from, s.to, p->s.mixed + (j + 1) * B * C, B, p->s.kvrg + j * B * C, packed);
    }
}

/* o = r (S + bonus k v), S = diag(w) S + k v, for one head: S [N, N], all others [N]. */
static void wkv(const float *r, const float *w, const float *k, const float *v, const float *bonus, float *restrict S,
                float *restrict o, int64_t N) {
    float strength = 0;
    for (int64_t i = 0; i < N; i++) strength += r[i] * bonus[i] * k[i];
    for (int64_t j = 0; j < N; j++) o[j] = strength * v[j];
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
            float old = S[i * N + j];
            o[j] = plus_product_of_one(o[j], r[i], old);
            S[i * N + j] = plus_product_of_one(w[i] * old, k[i], v[j]);
        }
}

/* The recurrence, its norm and the gate, for a share of the heads. Their output takes the place of `mixed`. */
static void attend(const struct step *p, int64_t i, struct share heads, float *packed) {
    const struct layer *layer = p->model->layer + i;
    int64_t N = p->model->size, C = p->model->heads * N, B = p->B, from = heads.from * N, to = heads.to * N;
    multiply(&layer->decay_w2, from, to, p->s.low, B, p->s.decay, packed);
    for (int64_t b = 0; b < B; b++) {
        float *decay = p->s.decay + b * C, *out = p->s.mixed + b * C, *kvrg[4];
        for (int64_t j = 0; j < 4; j++) kvrg[j] = p->s.kvrg + (j * B + b) * C;
        for (int64_t c = from; c < to; c++) decay[c] += layer->decay[c];
        each_decay(decay + from, to - from);
        for (int64_t at = from; at < to; at += N) {
            float *S = (float *)state_at(&p->att_kv, i, b) + at * N;
            wkv(kvrg[2] + at, decay + at, kvrg[0] + at, kvrg[1] + at, layer->bonus + at, S, out + at, N);
            standardize(out + at, out + at, N, 64e-5f);
        }
        each_gate(kvrg[3] + from, to - from);
        for (int64_t c = from; c < to; c++)
            out[c] = (out[c] * layer->ln_x.weight[c] + layer->ln_x.bias[c]) * kvrg[3][c];
    }
}

static void before_ffn(const struct step *p, int64_t i, int64_t b) {
    const struct layer *layer = p->model->layer + i;
    int64_t C = p->model->heads * p->model->size;
    float *y = p->s.y + b * C, *dx = p->s.dx + b * C;
    layer_norm(&layer->ln2, p->s.x + b * C, y, C);
    shift((int)p->ffn_x.dtype, state_at(&p->ffn_x, i, b), y, dx, C);
    lerp(y, dx, layer->ffn_maa_k, p->s.mixed + b * C, C);
    lerp(y, dx, layer->ffn_maa_r, p->s.mixed + (p->B + b) * C, C);
}

static void widen(const struct step *p, const struct layer *layer, struct share mine, float *packed) {
    int64_t C = layer->key.cols, F = layer->key.rows, B = p->B;
    struct share k = within(mine, 0, F), r = within(mine, F, C);
    multiply(&layer->key, k.from, k.to, p->s.mixed, B, p->s.key, packed);
    multiply(&layer->receptance, r.from, r.to, p->s.mixed + B * C, B, p->s.receptance, packed);
    for (int64_t b = 0; b < B; b++) {
        each_squared_relu(p->s.key + b * F + k.from, k.to - k.from);
        each_sigmoid(p->s.receptance + b * C + r.from, r.to - r.from);
    }
}

static void layer_step(const struct step *p, int64_t i, int thread) {
    const struct layer *layer = p->model->layer + i;
    int64_t H = p->model->heads, C = H * p->model->size, F = layer->key.rows, D = layer->decay_w1.rows, B = p->B;
    int64_t every = p->model->rescale_every;
    float *packed = p->s.packed + thread * p->s.packed_size;
    float scale = every && (i + 1) % every == 0 ? 0.5f : 1.0f;
    struct share rows = share_of(B, 1, thread, p->threads), s;

    for (int64_t b = rows.from; b < rows.to; b++) before_attention(p, i, b);
    meet(p->barrier, p->threads);
    s = share_of(layer->maa_w1.rows, 16, thread, p->threads);
    multiply(&layer->maa_w1, s.from, s.to, p->s.mixed, B, p->s.lora, packed);
    for (int64_t b = 0; b < B; b++) each_tangent(p->s.lora + b * layer->maa_w1.rows + s.from, s.to - s.from);
    meet(p->barrier, p->threads);
    mix(p, layer, share_of(5 * C, 64, thread, p->threads));
    meet(p->barrier, p->threads);
    project(p, layer, share_of(D + 4 * C, 16, thread, p->threads), packed);
    meet(p->barrier, p->threads);
    attend(p, i, share_of(H, 1, thread, p->threads), packed);
    meet(p->barrier, p->threads);
    s = share_of(C, 16, thread, p->threads);
    multiply(&layer->output, s.from, s.to, p->s.mixed, B, p->s.out, packed);
    add(p, 0, 1.0f, s);
    meet(p->barrier, p->threads);
    for (int64_t b = rows.from; b < rows.to; b++) before_ffn(p, i, b);
    meet(p->barrier, p->threads);
    widen(p, layer, share_of(F + C, 16, thread, p->threads), packed);
    meet(p->barrier, p->threads);
    multiply(&layer->value, s.from, s.to, p->s.key, B, p->s.out, packed);
    add(p, p->s.receptance, scale, s);
    meet(p->barrier, p->threads);
}

EXPORT(rwkv6)
