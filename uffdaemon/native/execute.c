/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Python's operations, carried out between events.
 *
 * Python decides on them knowing the events that it has taken in.  Later ones void what they touch,
 * and nothing else: where somebody discards memory all the time, there is always a later one.
 */
#define _GNU_SOURCE
#include "execute.h"

#include <errno.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#include "base.h"
#include "queue.h"
#include "serve.h"
#include "waitqueue.h"

#define MAX_WAIT_NS 5000000 /* for all operations of a call, while events are in flight */

static int overlaps(uint64_t start, uint64_t length, uint64_t low, uint64_t high)
{
    return start < high && low < start + length;
}

/* Whether an event since number `events` voids the operation.  Under `executing` or `change`. */
static int is_void(const struct uffdaemon_port *port, const struct uffdaemon_operation *operation,
                   uint64_t events)
{
    uint64_t now = atomic_load_explicit(&port->events, memory_order_acquire);

    if (operation->code == _UFFDIO_WAKE || now == events)
        return 0;
    if (port->rearranged > events || now - events > UFFDAEMON_DISCARDS)
        return 1;
    for (uint64_t event = events + 1; event <= now; event++) {
        uint64_t low = port->discards[event % UFFDAEMON_DISCARDS].start;
        uint64_t high = port->discards[event % UFFDAEMON_DISCARDS].end;

        if (overlaps(operation->dst, operation->length, low, high) ||
            (operation->code == _UFFDIO_MOVE &&
             overlaps(operation->src, operation->length, low, high)))
            return 1;
    }
    return 0;
}

/* The fault flags of what such an operation resolves. */
static unsigned kind_of(const struct uffdaemon_operation *operation)
{
    return operation->code == _UFFDIO_WRITEPROTECT ? UFFD_PAGEFAULT_FLAG_WP
           : operation->code == _UFFDIO_CONTINUE   ? UFFD_PAGEFAULT_FLAG_MINOR
                                                   : 0;
}

/* Brings in what a copy reads, which may take long: a mapped file on a slow disk, memory that others
 * serve.  The copy itself then takes no time in which an event could be read, and its pages
 * discarded, without anybody noticing.  What fails here fails in the copy. */
static void bring_source(const struct uffdaemon_operation *operation)
{
    uint64_t page = uffdaemon_page_size(), start = operation->src & ~(page - 1);

    if (operation->code == _UFFDIO_COPY)
        madvise((void *)(uintptr_t)start, operation->src + operation->length - start,
                MADV_POPULATE_READ);
}

/* Once.  Returns whether it is worth trying again: an event is in flight. */
static int attempt(struct uffdaemon_port *port, struct uffdaemon_operation *operation,
                   uint64_t events)
{
    int locked = uffdaemon_timedlock(&port->executing) == 0, again = 0;

    if (locked ? is_void(port, operation, events)
               : operation->code != _UFFDIO_WAKE &&
                     atomic_load_explicit(&port->events, memory_order_acquire) != events) {
        operation->error = EAGAIN;
        operation->done = operation->present = 0;
    } else {
        uffdaemon_execute(port->fd, operation, 1);
        again = operation->error == EAGAIN && !operation->done && !operation->present;
    }
    if (locked)
        uffdaemon_unlock(&port->executing);
    return again;
}

/* Carries out operations that were decided on by somebody who knows of `events` events.  What later
 * ones void ends with EAGAIN, and so does what found an event in flight all the time. */
void uffdaemon_port_execute(struct uffdaemon_port *port, struct uffdaemon_operation *operations,
                            size_t count, uint64_t events)
{
    struct uffdaemon_naps naps;
    uint64_t begun = 0;

    for (size_t index = 0; port->notify >= 0 && index < count; index++)
        bring_source(&operations[index]);
    for (size_t index = 0; index < count; index++)
        while (attempt(port, &operations[index], events)) {
            if (!begun) {
                begun = uffdaemon_now();
                __atomic_fetch_add(&port->counts[kind_of(&operations[index])][UFFDAEMON_DEFERRED],
                                   1, __ATOMIC_RELAXED);
                uffdaemon_naps_begin(&naps);
            }
            if (uffdaemon_now() - begun > MAX_WAIT_NS)
                break;
            /* Whoever waits until its event is read cannot run on before.  A resolver's thread
             * reads by itself. */
            if (port->notify < 0 && uffdaemon_queue_has_room(&port->queue))
                uffdaemon_serve_once(port, UFFDAEMON_MESSAGES);
            uffdaemon_nap(&naps, 1);
        }
    if (begun)
        uffdaemon_naps_end(&naps);
    for (size_t index = 0; index < count; index++) {
        uint64_t length = operations[index].done + operations[index].present;

        if (length && !uffdaemon_wait_queue_empty(&port->waiting))
            uffdaemon_wait_queue_wake(&port->waiting, operations[index].dst, length);
    }
}
