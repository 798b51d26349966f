/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#ifndef UFFDAEMON_BASE_H
#define UFFDAEMON_BASE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Code that runs for each fault is kept together: a fault finds its pages and lines cold. */
#define UFFDAEMON_HOT __attribute__((hot))
#define UFFDAEMON_COLD __attribute__((noinline, cold))

/* CLOCK_MONOTONIC, nanoseconds. */
uint64_t uffdaemon_now(void);

/* Bytes in a base page: 4 KiB; on arm64 also 16 or 64 KiB.  Async-signal-safe. */
#define UFFDAEMON_LARGEST_PAGE (64u << 10)
uint64_t uffdaemon_page_size(void);
uint64_t uffdaemon_page_of(uint64_t address); /* start of the page */

/* Spin locks, also taken in signal handlers: held for a few instructions, and never across a system
 * call or an access to served memory. */
void uffdaemon_spin_lock(_Atomic uint32_t *lock);
void uffdaemon_spin_unlock(_Atomic uint32_t *lock);

/* Zeroed memory, aligned to a cache line, or NULL.  Mapped, not malloc'ed: fork(2) holds malloc's
 * locks, and waits until its event has been read.  Threads that read events use these two. */
void *uffdaemon_alloc(size_t size);
void uffdaemon_free(void *memory);

/*
 * Pauses while an event is in flight.  Who discards memory all the time leaves a microsecond
 * between two events, from running on after the first was read until the second is sent.  A thread
 * that waits on the same core gets to run then only if its timer expires in it; so the lengths of
 * pauses vary.  One on another core finds it by trying all the time, but to do so often would cost
 * it its turn here.
 */
struct uffdaemon_naps {
    uint64_t random, limit; /* ns */
    unsigned count;
    int slack; /* that the thread's timers had before */
};

void uffdaemon_naps_begin(struct uffdaemon_naps *naps);
uint64_t uffdaemon_nap(struct uffdaemon_naps *naps, int news);
void uffdaemon_naps_end(const struct uffdaemon_naps *naps);

/* A mutex for threads of one process, not for signal handlers.  Zeros are a free one.  Inline, and
 * no more than one atomic operation where nobody else wants it: two are taken for each fault. */
struct uffdaemon_mutex {
    _Atomic uint32_t state; /* a futex: 0: unlocked, 1: locked, 2: locked, with waiters */
};

UFFDAEMON_COLD int uffdaemon_mutex_wait(struct uffdaemon_mutex *mutex, int timed);
UFFDAEMON_COLD void uffdaemon_mutex_wake(struct uffdaemon_mutex *mutex);

static inline int uffdaemon_mutex_try(struct uffdaemon_mutex *mutex)
{
    uint32_t free = 0;

    return atomic_compare_exchange_strong_explicit(&mutex->state, &free, 1, memory_order_acquire,
                                                   memory_order_relaxed);
}

static inline void uffdaemon_lock(struct uffdaemon_mutex *mutex)
{
    if (!uffdaemon_mutex_try(mutex))
        uffdaemon_mutex_wait(mutex, 0);
}

/* 0, or ETIMEDOUT after 20 ms: the holder may be copying from memory that the caller serves. */
static inline int uffdaemon_timedlock(struct uffdaemon_mutex *mutex)
{
    return uffdaemon_mutex_try(mutex) ? 0 : uffdaemon_mutex_wait(mutex, 1);
}

static inline void uffdaemon_unlock(struct uffdaemon_mutex *mutex)
{
    if (atomic_exchange_explicit(&mutex->state, 0, memory_order_release) == 2)
        uffdaemon_mutex_wake(mutex);
}

#endif
