/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that wait in their signal handler until Python has resolved their fault. */
#ifndef UFFDAEMON_WAITQUEUE_H
#define UFFDAEMON_WAITQUEUE_H

#include <stdatomic.h>
#include <stdint.h>

/* On the waiting thread's stack. */
struct uffdaemon_waiter {
    struct uffdaemon_waiter *next;
    uint64_t page;          /* bytes */
    _Atomic uint32_t woken; /* the futex */
};

struct uffdaemon_wait_queue {
    struct uffdaemon_waiter *_Atomic first; /* written under `lock` */
    _Atomic uint32_t lock;                  /* a spin lock */
};

void uffdaemon_wait_queue_add(struct uffdaemon_wait_queue *queue, struct uffdaemon_waiter *waiter);
void uffdaemon_wait_queue_remove(struct uffdaemon_wait_queue *queue,
                                 struct uffdaemon_waiter *waiter);
void uffdaemon_wait_queue_wait(struct uffdaemon_wait_queue *queue, struct uffdaemon_waiter *waiter,
                               const _Atomic uint32_t *closing);
void uffdaemon_wait_queue_wake(struct uffdaemon_wait_queue *queue, uint64_t start, uint64_t length);
int uffdaemon_wait_queue_empty(const struct uffdaemon_wait_queue *queue);

#endif
