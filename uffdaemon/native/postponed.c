/* SPDX-License-Identifier: Apache-2.0 */
/* Faults that wait for the end of an event, and are tried again by C. */
#include "postponed.h"

#include <errno.h>

#include "queue.h"

/* Keeps a fault to be tried again here: an event is in flight, which is over as soon as the thread
 * that caused it has run.  Returns whether it did. */
int uffdaemon_postpone(struct uffdaemon_port *port, const struct uffdaemon_record *record,
                       uint64_t now)
{
    if (record->error != EAGAIN || port->postponed == UFFDAEMON_MESSAGES)
        return 0;
    if (!port->postponed)
        port->postponed_since = now;
    if (!record->message.reserved2) /* for the first time */
        __atomic_fetch_add(&port->counts[record->message.arg.pagefault.flags &
                                         (UFFDAEMON_KINDS - 1)][UFFDAEMON_DEFERRED],
                           1, __ATOMIC_RELAXED);
    port->later[port->postponed++] = *record;
    port->later[port->postponed - 1].error = 0;
    port->later[port->postponed - 1].message.reserved2 = 1;
    return 1;
}

/* Python is told of those that have waited for long, so that they are listed, and tries them as
 * well. */
void uffdaemon_tell_postponed(struct uffdaemon_port *port, uint64_t now)
{
    for (size_t index = 0; index < port->postponed; index++) {
        struct uffdaemon_record *record = &port->later[index], told = *record;

        if (record->message.reserved3)
            continue;
        record->message.reserved3 = 1;
        told.error = EAGAIN;
        uffdaemon_queue_push(&port->queue, &told, now);
        uffdaemon_port_notify(port);
    }
}

/* From faulting threads: asks the serving thread to try the page of a fault after its next read. 
 * Only it can act right after one, and if no event comes, the faulting thread can resolve it. */
void uffdaemon_want(struct uffdaemon_port *port, const struct uffdaemon_record *record)
{
    const struct uffd_msg *message = &record->message;
    uint64_t page = uffdaemon_page_of(message->arg.pagefault.address), none;

    page |= message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR ? 3 : 1;
    for (unsigned at = 0; at < UFFDAEMON_WANTED; at++) {
        none = 0;
        if (__atomic_compare_exchange_n(&port->wanted[at], &none, page, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED))
            return;
    }
}
