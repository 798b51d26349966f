/* SPDX-License-Identifier: Apache-2.0 */
/* The clock and the locks that all other files build on. */
#ifndef UFFDAEMON_BASE_H
#define UFFDAEMON_BASE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

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

/* 0, or ETIMEDOUT after 20 ms: the holder may be copying from memory that the caller serves. */
int uffdaemon_lock_patiently(pthread_mutex_t *mutex);

#endif
