/* SPDX-License-Identifier: Apache-2.0 */
/* Faulting threads that resolve by rules do so between two reads, once events have been applied. */
#include "reading.h"

#include <sched.h>

#include "grace.h"

/* Waits while an event may have been read but not applied: this thread may have caused it. */
void uffdaemon_wait_for_events(const struct uffdaemon_port *port)
{
    uint64_t reading = atomic_load(&port->reading);

    if (reading & 1)
        while (atomic_load(&port->reading) == reading)
            sched_yield();
}

/* Like `uffdaemon_read_lock`; no event is read before `uffdaemon_read_unlock`. */
unsigned uffdaemon_enter(struct uffdaemon_port *port)
{
    int counted = 0;

    for (;;) {
        unsigned ticket = uffdaemon_read_lock(&port->rules.readers);

        if (!(atomic_load(&port->reading) & 1)) {
            atomic_fetch_sub(&port->entering, (uint32_t)counted);
            return ticket;
        }
        uffdaemon_read_unlock(&port->rules.readers, ticket);
        atomic_fetch_add(&port->entering, (uint32_t)!counted);
        counted = 1;
        uffdaemon_wait_for_events(port);
    }
}
