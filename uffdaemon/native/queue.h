/* SPDX-License-Identifier: Apache-2.0 */
/* Records on their way to Python.  The queue grows, so that no reader of messages waits for
 * Python. */
#ifndef UFFDAEMON_QUEUE_H
#define UFFDAEMON_QUEUE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "record.h"

#define UFFDAEMON_OUTSTANDING 16 /* messages of Python's current batch that are kept */

struct uffdaemon_chunk;

struct uffdaemon_queue {
    /* Under `lock`. */
    struct uffdaemon_chunk *head, *tail, *spare;
    uint32_t lost; /* records dropped for want of memory */
    uint32_t outstanding_count;
    /* Dequeued, and their batch has not ended. */
    struct uffd_msg outstanding[UFFDAEMON_OUTSTANDING];

    /* Written under `lock`, read without it. */
    _Atomic uint64_t count;     /* records */
    _Atomic uint64_t forwarded; /* records that C has not resolved */
    /* When the first of those was read, and the first outstanding one: CLOCK_MONOTONIC ns; 0:
     * none. */
    _Atomic uint64_t since, outstanding_since;

    _Atomic uint32_t lock; /* a spin lock */
};

int uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                         uint64_t now);
long uffdaemon_queue_dequeue(struct uffdaemon_queue *queue, struct uffdaemon_record *records,
                             size_t capacity);
uint64_t uffdaemon_queue_count(const struct uffdaemon_queue *queue);
size_t uffdaemon_queue_pending(struct uffdaemon_queue *queue, struct uffd_msg *messages,
                               size_t capacity);
size_t uffdaemon_queue_outstanding(struct uffdaemon_queue *queue, struct uffd_msg *messages);
void uffdaemon_queue_end_batch(struct uffdaemon_queue *queue);
void uffdaemon_queue_free(struct uffdaemon_queue *queue);

#endif
