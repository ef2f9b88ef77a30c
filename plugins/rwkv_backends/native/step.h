/* A decode step from embedding to logits, the same for all versions. A version's file defines `struct layer` and
   `struct scratch` before it includes this, and `lay_out` and `layer_step` after. */

#pragma once
#include "layers.h"
#include "team.h"

struct model {
    int64_t layers, heads, size; /* of the heads: C = heads * size */
    int64_t rescale_every;       /* layers after which the residual stream is halved; 0: never */
    struct matrix emb;           /* [V, C] */
    struct norm ln0, ln_out;
    struct matrix head; /* [V, C] */
    const struct layer *layer;
};

struct step {
    const struct team *team;
    const struct model *model;
    struct state att_x, att_kv, ffn_x;
    const int64_t *tokens; /* [B] */
    int64_t B;
    float *logits; /* [B, V] */
    struct scratch s;
    int threads;
    struct barrier *barrier;
};

/* Lays the buffers out from `start`; gives how many numbers they take. */
static int64_t lay_out(const struct model *m, int64_t B, int threads, float *start, struct scratch *s);
/* One layer, by all threads; they have met when it returns. */
static void layer_step(const struct step *p, int64_t i, int thread);

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct buffer {
    float **at;
    int64_t size; /* numbers of one row */
};

/* Places buffers for B rows one after the other from `start`; gives how many numbers they take. */
static int64_t place(const struct buffer *buffers, unsigned long bytes, int64_t B, float *start) {
    int64_t used = 0;
    for (unsigned i = 0; i < bytes / sizeof *buffers; i++) {
        *buffers[i].at = start + used;
        used += (B * buffers[i].size + 15) / 16 * 16;
    }
    return used;
}

/* A product's share of the columns added to the stream: x += out, or out * gate. */
static void add(const struct step *p, const float *gate, float scale, struct share s) {
    int64_t C = p->model->heads * p->model->size;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t c = b * C + s.from; c < b * C + s.to; c++)
            p->s.x[c] = (p->s.x[c] + p->s.out[c] * (gate ? gate[c] : 1.0f)) * scale;
}

static void work(void *data) {
    struct step step = *(const struct step *)data, *p = &step;
    const struct model *m = p->model;
    int thread = p->team->thread();
    int64_t C = m->heads * m->size;
    p->threads = p->team->threads();
    uint64_t mode = flush_subnormals();
    struct share rows = share_of(p->B, 1, thread, p->threads);
    for (int64_t b = rows.from; b < rows.to; b++) {
        embedding(&m->emb, p->tokens[b], p->s.x + b * C);
        layer_norm(&m->ln0, p->s.x + b * C, p->s.x + b * C, C);
    }
    for (int64_t i = 0; i < m->layers; i++) layer_step(p, i, thread);
    for (int64_t b = rows.from; b < rows.to; b++) layer_norm(&m->ln_out, p->s.x + b * C, p->s.y + b * C, C);
    meet(p->barrier, p->threads);
    struct share s = share_of(m->head.rows, 16, thread, p->threads);
    multiply(&m->head, s.from, s.to, p->s.y, p->B, p->logits, p->s.packed + thread * p->s.packed_size);
    restore(mode);
}

/* One token for each of B rows: the state is updated, logits float32 [B, V] are written. `scratch` has room for what
   lay_out counts. Gives 1, nothing done, where a token is none of the vocabulary. */
static int decode(const struct team *team, const struct model *m, const struct state *states, const int64_t *tokens,
                  int64_t B, int64_t threads, float *scratch, float *logits) {
    struct barrier barrier = {0, 0, 0};
    struct step p = {team, m, states[0], states[1], states[2], tokens, B, logits, {0}, (int)threads, &barrier};
    for (int64_t b = 0; b < B; b++)
        if (tokens[b] < 0 || tokens[b] >= m->emb.rows) return 1;
    lay_out(m, B, (int)threads, scratch, &p.s);
    team->parallel(work, &p, (unsigned)threads, 0);
    return 0;
}

/* What Python calls of a version. */
#define EXPORT(version)                                                                                             \
    int64_t version##_scratch(const struct model *m, int64_t B, int64_t threads) {                                   \
        struct scratch unused;                                                                                       \
        return lay_out(m, B, (int)threads, 0, &unused);                                                              \
    }                                                                                                                \
    int version##_step(const struct team *team, const struct model *m, const struct state *states,                   \
                       const int64_t *tokens, int64_t B, int64_t threads, float *scratch, float *logits) {           \
        return decode(team, m, states, tokens, B, threads, scratch, logits);                                         \
    }                                                                                                                \
    int64_t version##_sizes(int64_t of) { return of == 0 ? sizeof(struct layer) : sizeof(struct model); }
