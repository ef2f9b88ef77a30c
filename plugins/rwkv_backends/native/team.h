/* The threads that torch itself uses, through its own OpenMP library: a second pool would fight the first for cores,
   as idle threads of both spin. Its functions come as pointers, so that nothing is linked and any compiler will do. */

#pragma once
#include <stdint.h>

struct team {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
    void (*barrier)(void);                                                              /* GOMP_barrier */
    int (*thread)(void);                                                                /* omp_get_thread_num */
    int (*threads)(void);                                                               /* omp_get_num_threads */
};

/* A thread's part of `count` things, in whole groups of `group`: from..to. */
struct share {
    int64_t from, to;
};

static inline struct share share_of(int64_t count, int64_t group, int thread, int threads) {
    int64_t groups = (count + group - 1) / group;
    struct share s = {groups * thread / threads * group, groups * (thread + 1) / threads * group};
    if (s.from > count) s.from = count;
    if (s.to > count) s.to = count;
    return s;
}

/* The part of it that lies in start..start + length, counted from start. */
static inline struct share within(struct share s, int64_t start, int64_t length) {
    int64_t from = s.from - start, to = s.to - start;
    return (struct share){from < 0 ? 0 : from > length ? length : from, to < 0 ? 0 : to > length ? length : to};
}
