/* The threads that torch itself uses, through its own OpenMP library: a second pool would fight the first for cores,
   as idle threads of both spin. Its functions come as pointers, so that nothing is linked and any compiler will do. */

#pragma once
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

struct team {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*thread)(void);                                                                /* omp_get_thread_num */
    int (*threads)(void);                                                               /* omp_get_num_threads */
};

/* Where the threads of a step wait for each other, some hundred times a step: for a moment awake, as there is seldom
   more to wait for, then asleep, so that on a busy machine the one that is late gets the core. */
struct barrier {
    int here, turn, asleep;
};

#define SPINS 2000 /* some 50 microseconds */

static void meet(struct barrier *b, int threads) {
    int turn = __atomic_load_n(&b->turn, __ATOMIC_ACQUIRE);
    if (threads == 1) return;
    if (__atomic_add_fetch(&b->here, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->here, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->turn, turn + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->asleep, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &b->turn, FUTEX_WAKE_PRIVATE, threads, 0, 0, 0);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&b->turn, __ATOMIC_ACQUIRE) != turn) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        __asm__ volatile("yield");
#endif
    }
    __atomic_add_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&b->turn, __ATOMIC_SEQ_CST) == turn)
        syscall(SYS_futex, &b->turn, FUTEX_WAIT_PRIVATE, turn, 0, 0, 0);
    __atomic_sub_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
}

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
