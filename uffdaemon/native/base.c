/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#define _GNU_SOURCE
#include "base.h"

#include <sched.h>
#include <time.h>
#include <sys/mman.h>
#include <unistd.h>

#define PATIENCE_NS 20000000

#ifdef __SANITIZE_THREAD__ /* which does not know pthread_mutex_clocklock before GCC 13 */
#define LOCK_CLOCK CLOCK_REALTIME
#define lock_until(mutex, until) pthread_mutex_timedlock(mutex, until)
#else
#define LOCK_CLOCK CLOCK_MONOTONIC
#define lock_until(mutex, until) pthread_mutex_clocklock(mutex, LOCK_CLOCK, until)
#endif

uint64_t uffdaemon_now(void)
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

int uffdaemon_lock_patiently(pthread_mutex_t *mutex)
{
    struct timespec until;

    if (pthread_mutex_trylock(mutex) == 0)
        return 0;
    clock_gettime(LOCK_CLOCK, &until);
    until.tv_nsec += PATIENCE_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return lock_until(mutex, &until);
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
