/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads that wait in their signal handler until Python has resolved their fault.
 *
 * Handlers run with all signals blocked, so the spin lock cannot deadlock; no system call is made
 * under it.
 */
#define _GNU_SOURCE
#include "waitqueue.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base.h"

#define CHECK_NS 100000000 /* how often a thread checks whether its page has become present */
#define WOKEN 32           /* threads woken per locked pass */

static long futex(_Atomic uint32_t *word, int operation, uint32_t value,
                  const struct timespec *timeout)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

static int in_memory(uint64_t page)
{
    unsigned char there = 0;
    return mincore((void *)(uintptr_t)page, uffdaemon_page_size(), &there) == 0 && (there & 1);
}

/* Call it before Python can see the fault, so that no wake-up is missed. */
void uffdaemon_wait_queue_add(struct uffdaemon_wait_queue *queue, struct uffdaemon_waiter *waiter)
{
    uffdaemon_spin_lock(&queue->lock);
    waiter->next = atomic_load_explicit(&queue->first, memory_order_relaxed);
    atomic_store_explicit(&queue->first, waiter, memory_order_release);
    uffdaemon_spin_unlock(&queue->lock);
}

static void list_remove(struct uffdaemon_wait_queue *queue, struct uffdaemon_waiter *waiter)
{
    struct uffdaemon_waiter *each = atomic_load_explicit(&queue->first, memory_order_relaxed);

    if (each == waiter) {
        atomic_store_explicit(&queue->first, waiter->next, memory_order_relaxed);
        return;
    }
    for (; each; each = each->next)
        if (each->next == waiter) {
            each->next = waiter->next;
            return;
        }
}

void uffdaemon_wait_queue_remove(struct uffdaemon_wait_queue *queue,
                                 struct uffdaemon_waiter *waiter)
{
    uffdaemon_spin_lock(&queue->lock);
    list_remove(queue, waiter);
    uffdaemon_spin_unlock(&queue->lock);
}

/* Waits until woken, until the page is present by other means, or until `closing` is set; then
 * leaves the queue. */
void uffdaemon_wait_queue_wait(struct uffdaemon_wait_queue *queue, struct uffdaemon_waiter *waiter,
                               const _Atomic uint32_t *closing)
{
    struct timespec interval = {0, CHECK_NS};

    while (!atomic_load_explicit(&waiter->woken, memory_order_acquire) &&
           !atomic_load_explicit(closing, memory_order_acquire)) {
        futex(&waiter->woken, FUTEX_WAIT, 0, &interval);
        if (in_memory(waiter->page))
            break;
    }
    uffdaemon_wait_queue_remove(queue, waiter);
}

/* Wakes the threads that wait for a page in the range.  A thread may have left before its futex is
 * woken; another sleeper at that address then wakes spuriously, which every futex user handles. */
void uffdaemon_wait_queue_wake(struct uffdaemon_wait_queue *queue, uint64_t start, uint64_t length)
{
    _Atomic uint32_t *woken[WOKEN];
    unsigned count = WOKEN;

    while (count == WOKEN) {
        count = 0;
        uffdaemon_spin_lock(&queue->lock);
        for (struct uffdaemon_waiter *waiter =
                 atomic_load_explicit(&queue->first, memory_order_relaxed);
             waiter && count < WOKEN; waiter = waiter->next)
            if (waiter->page - start < length &&
                !atomic_exchange_explicit(&waiter->woken, 1, memory_order_release))
                woken[count++] = &waiter->woken;
        uffdaemon_spin_unlock(&queue->lock);
        for (unsigned index = 0; index < count; index++)
            futex(woken[index], FUTEX_WAKE, 1, NULL);
    }
}

int uffdaemon_wait_queue_empty(const struct uffdaemon_wait_queue *queue)
{
    return !atomic_load_explicit(&queue->first, memory_order_relaxed);
}
