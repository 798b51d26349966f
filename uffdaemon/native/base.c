/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#define _GNU_SOURCE
#include "base.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_NS 20000000

UFFDAEMON_HOT uint64_t uffdaemon_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t uffdaemon_page_size(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t uffdaemon_page_of(uint64_t address)
{
    return address & ~(uffdaemon_page_size() - 1);
}

void uffdaemon_spin_lock(_Atomic uint32_t *lock)
{
    while (atomic_exchange_explicit(lock, 1, memory_order_acquire))
        sched_yield();
}

void uffdaemon_spin_unlock(_Atomic uint32_t *lock)
{
    atomic_store_explicit(lock, 0, memory_order_release);
}

/* Locks the mutex and returns 0; if `timed`, gives up after TIMEOUT_NS and returns ETIMEDOUT. */
int uffdaemon_mutex_wait(struct uffdaemon_mutex *mutex, int timed)
{
    uint64_t end = timed ? uffdaemon_now() + TIMEOUT_NS : 0;
    struct timespec until = {(time_t)(end / 1000000000), (long)(end % 1000000000)};

    while (atomic_exchange_explicit(&mutex->state, 2, memory_order_acquire))
        if (syscall(SYS_futex, &mutex->state, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 2,
                    timed ? &until : NULL, NULL, FUTEX_BITSET_MATCH_ANY) &&
            errno == ETIMEDOUT)
            return ETIMEDOUT;
    return 0;
}

void uffdaemon_mutex_wake(struct uffdaemon_mutex *mutex)
{
    syscall(SYS_futex, &mutex->state, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

#define HEAD 64 /* bytes before the memory; the first eight are the size of the mapping */

void *uffdaemon_alloc(size_t size)
{
    size_t *head = mmap(NULL, size + HEAD, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (head == MAP_FAILED)
        return NULL;
    *head = size + HEAD;
    return (char *)head + HEAD;
}

void uffdaemon_free(void *memory)
{
    char *head = (char *)memory - HEAD;

    if (memory)
        munmap(head, *(size_t *)(void *)head);
}
