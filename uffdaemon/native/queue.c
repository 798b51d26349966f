/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records on their way to Python.
 *
 * Python may be slow, or even wait for the very page that the next message is about.  So the queue
 * grows by whole mapped chunks, and shrinks again.  A message that has been read is never lost: room
 * for its record is reserved before.  Beyond a limit, messages are read slowly: who causes events
 * waits until they are read.  Signal handlers push, too: no malloc here.
 */
#define _GNU_SOURCE
#include "queue.h"

#include <string.h>
#include <sys/mman.h>

#include "alarm.h"
#include "base.h"

#define CHUNK 65536
#define PER_CHUNK ((CHUNK - 64) / sizeof(struct uffdaemon_record))

struct uffdaemon_chunk {
    struct uffdaemon_chunk *next;
    uint32_t filled, taken;
    uint64_t padding[6];
    struct uffdaemon_record records[PER_CHUNK];
};
_Static_assert(sizeof(struct uffdaemon_chunk) <= CHUNK, "uffdaemon_chunk");

/* Under `lock`. */
static void add(_Atomic uint64_t *number, uint64_t by)
{
    uint64_t before = atomic_load_explicit(number, memory_order_relaxed);
    atomic_store_explicit(number, before + by, memory_order_relaxed);
}

static struct uffdaemon_chunk *chunk_map(void)
{
    void *mapped = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapped == MAP_FAILED ? NULL : mapped;
}

/* Appends the spare chunk.  Under `lock`. */
static void append_spare(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *chunk = queue->spare;

    queue->spare = NULL;
    chunk->next = NULL;
    chunk->filled = chunk->taken = 0;
    if (queue->tail)
        queue->tail->next = chunk;
    else
        queue->head = chunk;
    queue->tail = chunk;
}

/* How many records there is room for.  Under `lock`. */
static size_t room(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *tail = queue->tail;

    /* Empty: reuse it from the start, so that no more of its pages are touched. */
    if (tail && tail->taken == tail->filled)
        tail->taken = tail->filled = 0;
    return (tail ? PER_CHUNK - tail->filled : 0) + (queue->spare ? PER_CHUNK : 0);
}

/* Locks, with room for UFFDAEMON_RESERVED records; returns whether there is.  Memory is mapped
 * without the lock: another thread may have left a spare chunk meanwhile. */
static int lock_with_room(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *mapped = NULL;
    int enough, tried = 0;

    for (;; tried = 1) {
        uffdaemon_spin_lock(&queue->lock);
        if (mapped && !queue->spare) {
            queue->spare = mapped;
            mapped = NULL;
        }
        enough = room(queue) >= UFFDAEMON_RESERVED;
        atomic_store_explicit(&queue->limit, enough ? queue->full : 0, memory_order_relaxed);
        if (!mapped && (enough || tried))
            return enough;
        uffdaemon_spin_unlock(&queue->lock);
        if (mapped)
            munmap(mapped, CHUNK);
        mapped = mapped ? NULL : chunk_map();
    }
}

/* Reserves the room that a reader needs: for the records of one read, and for those of the faults
 * that it has postponed.  Returns whether there is memory for it.  Without, nothing may be read:
 * who waits for a fault or an event waits on, and neither is lost. */
int uffdaemon_queue_reserve(struct uffdaemon_queue *queue)
{
    int enough = lock_with_room(queue);

    if (!enough)
        queue->shortages++;
    uffdaemon_spin_unlock(&queue->lock);
    return enough;
}

/* Whether there is memory for what reading brings. */
int uffdaemon_queue_has_room(struct uffdaemon_queue *queue)
{
    return atomic_load_explicit(&queue->limit, memory_order_relaxed) ||
           uffdaemon_queue_reserve(queue);
}

/* Returns whether the watchdog has to know.  Under `lock`, with room. */
static int append(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                  uint64_t now)
{
    int first = 0;

    if (!queue->tail || queue->tail->filled == PER_CHUNK)
        append_spare(queue);
    queue->tail->records[queue->tail->filled++] = *record;
    add(&queue->count, 1);
    if (!record->code) {
        if (!atomic_load_explicit(&queue->forwarded, memory_order_relaxed)) {
            atomic_store(&queue->since, now);
            first = 1;
        }
        add(&queue->forwarded, 1);
    }
    return first;
}

/* By readers, into the room that they have reserved, which is reserved anew. */
void uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                          uint64_t now)
{
    int alarm, scarce;

    uffdaemon_spin_lock(&queue->lock);
    alarm = append(queue, record, now);
    scarce = room(queue) < UFFDAEMON_RESERVED;
    uffdaemon_spin_unlock(&queue->lock);
    if (alarm)
        uffdaemon_alarm_raise();
    if (scarce)
        uffdaemon_queue_reserve(queue);
}

/* By anyone else, and from signal handlers.  Returns 0 where there is no memory for the record, and
 * what is reserved for readers. */
int uffdaemon_queue_offer(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                          uint64_t now)
{
    int enough = lock_with_room(queue), alarm = enough && append(queue, record, now);

    uffdaemon_spin_unlock(&queue->lock);
    if (alarm)
        uffdaemon_alarm_raise();
    return enough;
}

/* Whether a thread waits for Python to handle it.  A thread that discarded memory, say, does
 * not: any number of such events must not hide a fault. */
static int awaited(const struct uffdaemon_record *record)
{
    return !record->code && (record->message.event == UFFD_EVENT_PAGEFAULT ||
                             record->message.event == UFFD_EVENT_FORK);
}

/* Dequeued records count as outstanding until their batch ends. */
static void begin_batch(struct uffdaemon_queue *queue, const struct uffdaemon_record *record)
{
    if (awaited(record) && queue->outstanding_count < UFFDAEMON_OUTSTANDING)
        queue->outstanding[queue->outstanding_count++] = record->message;
    if (!queue->outstanding_since)
        atomic_store(&queue->outstanding_since, queue->since);
}

/* Dequeues at most `capacity` records, the oldest first; returns how many.  From one thread at a
 * time. */
long uffdaemon_queue_dequeue(struct uffdaemon_queue *queue, struct uffdaemon_record *records,
                             size_t capacity)
{
    struct uffdaemon_chunk *unused = NULL;
    size_t taken = 0, forwarded = 0;

    uffdaemon_spin_lock(&queue->lock);
    while (taken < capacity && queue->head) {
        struct uffdaemon_chunk *chunk = queue->head;

        if (chunk->taken < chunk->filled) {
            records[taken] = chunk->records[chunk->taken++];
            if (!records[taken].code) {
                begin_batch(queue, &records[taken]);
                forwarded++;
            }
            taken++;
        } else if (chunk->next) {
            queue->head = chunk->next;
            if (queue->spare) {
                chunk->next = unused; /* unmapped after unlocking */
                unused = chunk;
            } else {
                queue->spare = chunk;
            }
        } else {
            break;
        }
    }
    add(&queue->count, -taken);
    add(&queue->forwarded, -forwarded);
    if (!atomic_load_explicit(&queue->forwarded, memory_order_relaxed))
        atomic_store(&queue->since, 0);
    if (room(queue) >= UFFDAEMON_RESERVED)
        atomic_store_explicit(&queue->limit, queue->full, memory_order_relaxed);
    uffdaemon_spin_unlock(&queue->lock);
    while (unused) {
        struct uffdaemon_chunk *next = unused->next;

        munmap(unused, CHUNK);
        unused = next;
    }
    return (long)taken;
}

/* How many records are queued.  From any thread. */
uint64_t uffdaemon_queue_count(const struct uffdaemon_queue *queue)
{
    return atomic_load_explicit(&queue->count, memory_order_relaxed);
}

/* Copies at most `capacity` messages that threads wait for, without dequeuing them; returns how
 * many. */
size_t uffdaemon_queue_pending(struct uffdaemon_queue *queue, struct uffd_msg *messages,
                               size_t capacity)
{
    size_t found = 0;

    uffdaemon_spin_lock(&queue->lock);
    for (struct uffdaemon_chunk *chunk = queue->head; chunk; chunk = chunk->next)
        for (uint32_t index = chunk->taken; index < chunk->filled && found < capacity; index++)
            if (awaited(&chunk->records[index]))
                messages[found++] = chunk->records[index].message;
    uffdaemon_spin_unlock(&queue->lock);
    return found;
}

/* Copies the outstanding messages, at most UFFDAEMON_OUTSTANDING; returns how many. */
size_t uffdaemon_queue_outstanding(struct uffdaemon_queue *queue, struct uffd_msg *messages)
{
    size_t found;

    uffdaemon_spin_lock(&queue->lock);
    found = queue->outstanding_count;
    memcpy(messages, queue->outstanding, found * sizeof(messages[0]));
    uffdaemon_spin_unlock(&queue->lock);
    return found;
}

/* Python has finished what it dequeued. */
void uffdaemon_queue_end_batch(struct uffdaemon_queue *queue)
{
    uffdaemon_spin_lock(&queue->lock);
    queue->outstanding_count = 0;
    atomic_store(&queue->outstanding_since, 0);
    uffdaemon_spin_unlock(&queue->lock);
}

void uffdaemon_queue_free(struct uffdaemon_queue *queue)
{
    while (queue->head) {
        struct uffdaemon_chunk *chunk = queue->head;

        queue->head = chunk->next;
        munmap(chunk, CHUNK);
    }
    if (queue->spare)
        munmap(queue->spare, CHUNK);
    memset(queue, 0, sizeof(*queue));
}
