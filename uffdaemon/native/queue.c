/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records on their way to Python.
 *
 * Python may be slow, or even wait for the very page that the next message is about.  So a reader
 * of messages never waits for room: the queue grows by whole mapped chunks, and shrinks again.
 * Signal handlers push, too: no malloc here.
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

/* Appends the spare chunk; returns whether there was one.  Under `lock`. */
static int append_spare(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *chunk = queue->spare;

    if (!chunk)
        return 0;
    queue->spare = NULL;
    chunk->next = NULL;
    chunk->filled = chunk->taken = 0;
    if (queue->tail)
        queue->tail->next = chunk;
    else
        queue->head = chunk;
    queue->tail = chunk;
    return 1;
}

/* Locks, and returns whether the last chunk has room.  Memory is mapped without the lock: another
 * thread may have appended a chunk meanwhile, or left a spare one. */
static int lock_with_room(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *mapped = NULL, *unused = NULL;
    int room;

    for (;;) {
        uffdaemon_spin_lock(&queue->lock);
        if (mapped && queue->spare)
            unused = mapped;
        else if (mapped)
            queue->spare = mapped;
        room = (queue->tail && queue->tail->filled < PER_CHUNK) || append_spare(queue);
        if (!unused && (room || mapped))
            return room;
        uffdaemon_spin_unlock(&queue->lock);
        if (unused) {
            munmap(unused, CHUNK);
            unused = mapped = NULL;
        } else {
            mapped = chunk_map();
            if (!mapped) {
                uffdaemon_spin_lock(&queue->lock);
                return 0;
            }
        }
    }
}

/* From any thread, and from signal handlers.  Without memory, counts the record as lost and
 * returns 0: the thread that waits for it faults again, or is reported by the watchdog. */
int uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                         uint64_t now)
{
    int alarm = 0;

    if (!lock_with_room(queue)) {
        queue->lost++;
        uffdaemon_spin_unlock(&queue->lock);
        return 0;
    }
    queue->tail->records[queue->tail->filled++] = *record;
    add(&queue->count, 1);
    if (!record->code) {
        if (!atomic_load_explicit(&queue->forwarded, memory_order_relaxed)) {
            atomic_store(&queue->since, now);
            alarm = 1;
        }
        add(&queue->forwarded, 1);
    }
    uffdaemon_spin_unlock(&queue->lock);
    if (alarm)
        uffdaemon_alarm_raise();
    return 1;
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
            /* Empty: reuse it from the start, so that no more of its pages are touched. */
            chunk->taken = chunk->filled = 0;
            break;
        }
    }
    add(&queue->count, -taken);
    add(&queue->forwarded, -forwarded);
    if (!atomic_load_explicit(&queue->forwarded, memory_order_relaxed))
        atomic_store(&queue->since, 0);
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
