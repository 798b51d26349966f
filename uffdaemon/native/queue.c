/*
 * Records on their way to Python.
 *
 * Python may be late: it may even be waiting for the very page that the next message is about.  So
 * whoever reads messages never waits for room; the queue grows, by whole chunks that the kernel
 * gives, and shrinks again.  Signal handlers push as well: no malloc here.
 */
#include <string.h>
#include <sys/mman.h>

#include "native.h"

#define CHUNK 65536
#define PER_CHUNK ((CHUNK - 64) / sizeof(struct uffdaemon_record))

struct uffdaemon_chunk {
    struct uffdaemon_chunk *next;
    uint32_t filled, taken;
    uint64_t padding[6];
    struct uffdaemon_record records[PER_CHUNK];
};
_Static_assert(sizeof(struct uffdaemon_chunk) <= CHUNK, "uffdaemon_chunk");

static struct uffdaemon_chunk *chunk_new(struct uffdaemon_queue *queue)
{
    struct uffdaemon_chunk *chunk = queue->spare;

    if (chunk) {
        queue->spare = NULL;
    } else {
        void *mapped =
            mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED)
            return NULL;
        chunk = mapped;
    }
    chunk->next = NULL;
    chunk->filled = chunk->taken = 0;
    return chunk;
}

static void chunk_free(struct uffdaemon_queue *queue, struct uffdaemon_chunk *chunk)
{
    if (queue->spare)
        munmap(chunk, CHUNK);
    else
        queue->spare = chunk;
}

/* From any thread, and from signal handlers.  Without memory the record is counted as lost: a thread
 * that waits for it asks again, or is seen to wait by the watchdog. */
void uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                          uint64_t now)
{
    struct uffdaemon_chunk *chunk;

    uffdaemon_lock(&queue->lock);
    chunk = queue->tail;
    if (!chunk || chunk->filled == PER_CHUNK) {
        chunk = chunk_new(queue);
        if (!chunk) {
            queue->lost++;
            uffdaemon_unlock(&queue->lock);
            return;
        }
        if (queue->tail)
            queue->tail->next = chunk;
        else
            queue->head = chunk;
        queue->tail = chunk;
    }
    chunk->records[chunk->filled++] = *record;
    __atomic_store_n(&queue->count, queue->count + 1, __ATOMIC_RELAXED);
    if (!record->code) {
        if (!queue->forwarded) {
            __atomic_store_n(&queue->since, now, __ATOMIC_SEQ_CST);
            uffdaemon_watch_alarm();
        }
        __atomic_store_n(&queue->forwarded, queue->forwarded + 1, __ATOMIC_RELAXED);
    }
    uffdaemon_unlock(&queue->lock);
}

/* Whether somebody waits for what Python does about it.  Who has discarded memory, say, does not: any
 * number of such events must not hide a fault. */
static int awaited(const struct uffdaemon_record *record)
{
    return !record->code && (record->message.event == UFFD_EVENT_PAGEFAULT ||
                             record->message.event == UFFD_EVENT_FORK);
}

/* What Python is at counts as waiting until its turn is over. */
static void begin_turn(struct uffdaemon_queue *queue, const struct uffdaemon_record *record)
{
    if (awaited(record) && queue->turn_count < UFFDAEMON_TURN)
        queue->turn[queue->turn_count++] = record->message;
    if (!queue->turn_since)
        __atomic_store_n(&queue->turn_since, queue->since, __ATOMIC_SEQ_CST);
}

/* Takes at most `capacity` records, the oldest first; returns how many.  From one thread at a time. */
long uffdaemon_queue_take(struct uffdaemon_queue *queue, struct uffdaemon_record *records,
                          size_t capacity)
{
    size_t taken = 0, forwarded = 0;

    uffdaemon_lock(&queue->lock);
    while (taken < capacity && queue->head) {
        struct uffdaemon_chunk *chunk = queue->head;

        if (chunk->taken < chunk->filled) {
            records[taken] = chunk->records[chunk->taken++];
            if (!records[taken].code) {
                begin_turn(queue, &records[taken]);
                forwarded++;
            }
            taken++;
        } else if (chunk->next) {
            queue->head = chunk->next;
            chunk_free(queue, chunk);
        } else {
            /* Empty: begun anew, so that it does not grow page by page. */
            chunk->taken = chunk->filled = 0;
            break;
        }
    }
    __atomic_store_n(&queue->count, queue->count - taken, __ATOMIC_RELAXED);
    __atomic_store_n(&queue->forwarded, queue->forwarded - forwarded, __ATOMIC_RELAXED);
    if (!queue->forwarded)
        __atomic_store_n(&queue->since, 0, __ATOMIC_SEQ_CST);
    uffdaemon_unlock(&queue->lock);
    return (long)taken;
}

/* How many records there are by now, from any thread. */
uint64_t uffdaemon_queue_count(const struct uffdaemon_queue *queue)
{
    return __atomic_load_n(&queue->count, __ATOMIC_RELAXED);
}

/* Copies the messages that somebody waits behind, at most `capacity`, without taking them; returns how
 * many. */
size_t uffdaemon_queue_look(struct uffdaemon_queue *queue, struct uffd_msg *messages,
                            size_t capacity)
{
    size_t found = 0;

    uffdaemon_lock(&queue->lock);
    for (struct uffdaemon_chunk *chunk = queue->head; chunk; chunk = chunk->next)
        for (uint32_t index = chunk->taken; index < chunk->filled && found < capacity; index++)
            if (awaited(&chunk->records[index]))
                messages[found++] = chunk->records[index].message;
    uffdaemon_unlock(&queue->lock);
    return found;
}

/* Copies what Python is at: room for UFFDAEMON_TURN; returns how many. */
size_t uffdaemon_queue_look_at_turn(struct uffdaemon_queue *queue, struct uffd_msg *messages)
{
    size_t found;

    uffdaemon_lock(&queue->lock);
    found = queue->turn_count;
    memcpy(messages, queue->turn, found * sizeof(messages[0]));
    uffdaemon_unlock(&queue->lock);
    return found;
}

/* Python has come to an end with what it has taken. */
void uffdaemon_queue_turn_over(struct uffdaemon_queue *queue)
{
    uffdaemon_lock(&queue->lock);
    queue->turn_count = 0;
    __atomic_store_n(&queue->turn_since, 0, __ATOMIC_SEQ_CST);
    uffdaemon_unlock(&queue->lock);
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
