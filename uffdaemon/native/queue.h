/* SPDX-License-Identifier: Apache-2.0 */
/* Records on their way to Python. */
#ifndef UFFDAEMON_QUEUE_H
#define UFFDAEMON_QUEUE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "record.h"

#define UFFDAEMON_OUTSTANDING 16 /* messages of Python's current batch that are kept */

/* Records that readers may push between two reservations: those of a batch, of all postponed faults
 * twice, of the pages that faulting threads want tried, and of the watchdog. */
#define UFFDAEMON_RESERVED 512

struct uffdaemon_chunk;

struct uffdaemon_queue {
    /* Under `lock`. */
    struct uffdaemon_chunk *head, *tail, *spare;
    uint32_t shortages; /* how often there was no memory for the room to reserve */
    uint32_t outstanding_count;
    uint64_t full; /* constant: records from which on readers have to pause */
    /* Dequeued, and their batch has not ended. */
    struct uffd_msg outstanding[UFFDAEMON_OUTSTANDING];

    /* Written under `lock`, read without it. */
    _Atomic uint64_t count;     /* records */
    _Atomic uint64_t limit;     /* `full`; 0 while there is no memory for more records */
    _Atomic uint64_t forwarded; /* records that C has not resolved */
    /* When the first of those was read, and the first outstanding one: CLOCK_MONOTONIC ns; 0:
     * none. */
    _Atomic uint64_t since, outstanding_since;

    _Atomic uint32_t lock; /* a spin lock */
};

int uffdaemon_queue_reserve(struct uffdaemon_queue *queue);
int uffdaemon_queue_has_room(struct uffdaemon_queue *queue);
void uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                          uint64_t now);
int uffdaemon_queue_offer(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
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
