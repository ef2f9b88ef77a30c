/* The WKV of RWKV-6 for many tokens, its norm and its gate: what is between the products of a prompt. */

#pragma once
#include "layers.h"
#include "team.h"

enum { HEAD = 64, PARTS = HEAD / LANES }; /* numbers of a head, and vectors of them */
#define EACH_PART _Pragma("GCC unroll 16") for (int j = 0; j < PARTS; j++)

struct attention {
    const struct team *team;
    const char *kvrg;           /* [4, B, T, H, N] of `dtype` */
    const float *decay;         /* [B, T, H, N]: its logarithm is -e^this */
    const float *bonus;         /* [H, N] */
    const float *weight, *bias; /* [H, N]: of the norm */
    float *state;               /* [B, H, N, N] */
    char *out;                  /* [B, T, H, N] of `dtype` */
    int64_t B, T, H, dtype;
};

INLINE void put_many(int dtype, void *p, int64_t i, floats x) {
    float each[LANES];
    switch (dtype) {
    case FLOAT32: put((float *)p + i, x); break;
    case BFLOAT16: put_bfloat16((uint16_t *)p + i, x); break;
    default:
        put(each, x);
        for (int j = 0; j < LANES; j++) put_as(dtype, p, i + j, each[j]);
    }
}

/* o = r (S + bonus k v), S = diag(w) S + k v. */
INLINE void token(const float *r, const float *w, const float *k, const floats *v, const float *bonus, float *S,
                  floats *o) {
    floats strength = {0};
    for (int i = 0; i < HEAD; i += LANES) strength = plus_product(strength, get(r + i) * get(bonus + i), get(k + i));
    float direct = sum(strength);
    EACH_PART o[j] = direct * v[j];
    for (int i = 0; i < HEAD; i++)
        EACH_PART {
            floats old = get(S + i * HEAD + j * LANES);
            o[j] = plus_product(o[j], all(r[i]), old);
            put(S + i * HEAD + j * LANES, plus_product(w[i] * old, all(k[i]), v[j]));
        }
}

/* All tokens of one head of one row. Their numbers are C apart: the next token's are asked for ahead. */
INLINE void head_of(int dtype, const struct attention *a, int64_t b, int64_t h) {
    const int64_t C = a->H * HEAD, size = size_of(dtype), plane = a->B * a->T * C;
    const float *bonus = a->bonus + h * HEAD, *weight = a->weight + h * HEAD, *bias = a->bias + h * HEAD;
    float *S = a->state + (b * a->H + h) * HEAD * HEAD, r[HEAD], w[HEAD], k[HEAD];
    for (int64_t t = 0; t < a->T; t++) {
        int64_t at = (b * a->T + t) * C + h * HEAD;
        floats v[PARTS], o[PARTS], mean = {0}, variance = {0};
        for (int i = 0; i < 4; i++)
            for (int64_t byte = 0; byte < HEAD * size; byte += LINE)
                __builtin_prefetch(a->kvrg + (i * plane + at + 2 * C) * size + byte);
        for (int i = 0; i < HEAD; i += LINE / 4) __builtin_prefetch(a->decay + at + 2 * C + i);
        for (int i = 0; i < HEAD; i += LANES) {
            put(k + i, many_as(dtype, a->kvrg, at + i));
            put(r + i, many_as(dtype, a->kvrg, 2 * plane + at + i));
            put(w + i, decay(get(a->decay + at + i)));
        }
        EACH_PART v[j] = many_as(dtype, a->kvrg, plane + at + j * LANES);
        token(r, w, k, v, bonus, S, o);
        EACH_PART mean += o[j];
        mean = all(sum(mean) / HEAD);
        EACH_PART variance += (o[j] - mean) * (o[j] - mean);
        float scale = 1.0f / __builtin_sqrtf(sum(variance) / HEAD + 64e-5f);
        EACH_PART {
            floats normed = (o[j] - mean) * scale * get(weight + j * LANES) + get(bias + j * LANES);
            put_many(dtype, a->out, at + j * LANES, normed * gate(many_as(dtype, a->kvrg, 3 * plane + at + j * LANES)));
        }
    }
}

static void share_of_heads(void *data) {
    const struct attention *a = data;
    struct share mine = share_of(a->B * a->H, 1, a->team->thread(), a->team->threads());
    uint64_t mode = flush_subnormals();
    for (int64_t i = mine.from; i < mine.to; i++) {
        switch (a->dtype) {
        case FLOAT32: head_of(FLOAT32, a, i / a->H, i % a->H); break;
        case BFLOAT16: head_of(BFLOAT16, a, i / a->H, i % a->H); break;
        default: head_of(FLOAT16, a, i / a->H, i % a->H);
        }
    }
    restore(mode);
}

void rwkv6_attention(struct attention *a, int64_t threads) {
    a->team->parallel(share_of_heads, a, (unsigned)threads, 0);
}

int64_t rwkv6_attention_size(void) { return sizeof(struct attention); }
