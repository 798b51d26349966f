/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#define _GNU_SOURCE
#include "base.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
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

#define SHORT_NAP_NS 8000
#define LONG_NAP_NS 2000000
#define SPIN_EACH 8
#define SPIN_NS 15000

void uffdaemon_naps_begin(struct uffdaemon_naps *naps)
{
    naps->random = uffdaemon_now();
    naps->limit = SHORT_NAP_NS;
    naps->count = 0;
    naps->slack = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, 1);
}

/* `news`: whether there was another event since the last one.  If not, its thread may be stopped.
 * Returns for how long it is worth trying then, ns: most often once. */
uint64_t uffdaemon_nap(struct uffdaemon_naps *naps, int news)
{
    struct timespec pause = {0, 0};

    if (++naps->count % SPIN_EACH == 0 && news)
        return SPIN_NS; /* without a pause: that thread may run on another core */
    naps->limit = news ? SHORT_NAP_NS : naps->limit + naps->limit / 8;
    if (naps->limit > LONG_NAP_NS)
        naps->limit = LONG_NAP_NS;
    naps->random = naps->random * 6364136223846793005u + 1442695040888963407u;
    pause.tv_nsec = (long)((naps->random >> 33) % naps->limit);
    nanosleep(&pause, NULL);
    return 0;
}

void uffdaemon_naps_end(const struct uffdaemon_naps *naps)
{
    prctl(PR_SET_TIMERSLACK, naps->slack);
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
