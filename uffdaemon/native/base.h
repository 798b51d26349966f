/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#ifndef UFFDAEMON_BASE_H
#define UFFDAEMON_BASE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/* CLOCK_MONOTONIC, nanoseconds. */
uint64_t uffdaemon_now(void);

/* Spin locks, which signal handlers take too: held for a few instructions, and never over a system
 * call or an access to served memory. */
void uffdaemon_spin_lock(_Atomic uint32_t *lock);
void uffdaemon_spin_unlock(_Atomic uint32_t *lock);

/* 0, or ETIMEDOUT after 20 ms: the holder may be copying from memory that the caller serves. */
int uffdaemon_lock_patiently(pthread_mutex_t *mutex);

#endif
