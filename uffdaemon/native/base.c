/* SPDX-License-Identifier: Apache-2.0 */
/* The clock, locks and bitmaps that all other files build on. */
#define _GNU_SOURCE
#include "base.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>
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

int uffdaemon_bit(uint64_t bitmap, uint64_t bit)
{
    const unsigned char *bits = (const void *)(uintptr_t)bitmap;
    return __atomic_load_n(&bits[bit >> 3], __ATOMIC_ACQUIRE) >> (bit & 7) & 1;
}

static void set_byte(unsigned char *byte, unsigned char mask, int value)
{
    if (value)
        __atomic_fetch_or(byte, mask, __ATOMIC_RELEASE);
    else if (__atomic_load_n(byte, __ATOMIC_RELAXED) & mask)
        __atomic_fetch_and(byte, (unsigned char)~mask, __ATOMIC_RELEASE); /* zeros stay unwritten */
}

void uffdaemon_set_bits(void *bitmap, uint64_t first, uint64_t end, int value)
{
    unsigned char *bits = bitmap;

    while (first < end) {
        uint64_t byte = first >> 3, stop = (byte + 1) << 3;
        unsigned mask = 0xffu << (first & 7);

        if (stop > end) {
            mask &= 0xffu >> (stop - end);
            stop = end;
        }
        set_byte(&bits[byte], (unsigned char)mask, value);
        first = stop;
    }
}

/* Clears the bits, and gives the kernel back the pages of anonymous memory that hold nothing else. */
void uffdaemon_empty_bits(void *bitmap, uint64_t first, uint64_t end)
{
    uint64_t base = (uint64_t)(uintptr_t)bitmap, size = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t low = (base + (first + 7) / 8 + size - 1) / size * size;
    uint64_t high = (base + end / 8) / size * size;

    if (low < high && madvise((void *)(uintptr_t)low, high - low, MADV_DONTNEED) == 0) {
        uffdaemon_set_bits(bitmap, first, (low - base) * 8, 0);
        first = (high - base) * 8;
    }
    uffdaemon_set_bits(bitmap, first, end, 0);
}
