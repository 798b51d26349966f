/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#ifndef UFFDAEMON_BASE_H
#define UFFDAEMON_BASE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* What runs for each fault: kept together, since a fault finds its pages and lines cold. */
#define UFFDAEMON_HOT __attribute__((hot))
#define UFFDAEMON_COLD __attribute__((noinline, cold))

/* CLOCK_MONOTONIC, nanoseconds. */
uint64_t uffdaemon_now(void);

/* Bytes of the kernel's smallest page: 4 KiB, on arm64 16 or 64 KiB as well.  Safe in signal handlers. */
#define UFFDAEMON_LARGEST_PAGE (64u << 10)
uint64_t uffdaemon_page_size(void);
uint64_t uffdaemon_page_of(uint64_t address); /* where the page starts that `address` is in */

/* Spin locks, which signal handlers take too: held for a few instructions, and never over a system
 * call or an access to served memory. */
void uffdaemon_spin_lock(_Atomic uint32_t *lock);
void uffdaemon_spin_unlock(_Atomic uint32_t *lock);

/* Zeroed memory, aligned to a cache line, or NULL.  It is mapped: malloc's locks are held in fork(2),
 * and a fork waits until its event has been read.  So threads that read events use these two. */
void *uffdaemon_alloc(size_t size);
void uffdaemon_free(void *memory);

/* A mutex for threads of one process, not for signal handlers.  Zeros are a free one.  Inline, and no
 * more than one atomic operation where nobody else wants it: two are taken for each fault. */
struct uffdaemon_mutex {
    _Atomic uint32_t state; /* a futex: 0: free, 1: held, 2: held, and others may wait */
};

UFFDAEMON_COLD int uffdaemon_mutex_wait(struct uffdaemon_mutex *mutex, int patient);
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
static inline int uffdaemon_lock_patiently(struct uffdaemon_mutex *mutex)
{
    return uffdaemon_mutex_try(mutex) ? 0 : uffdaemon_mutex_wait(mutex, 1);
}

static inline void uffdaemon_unlock(struct uffdaemon_mutex *mutex)
{
    if (atomic_exchange_explicit(&mutex->state, 0, memory_order_release) == 2)
        uffdaemon_mutex_wake(mutex);
}

#endif
