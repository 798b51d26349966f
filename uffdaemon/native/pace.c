/* SPDX-License-Identifier: Apache-2.0 */
/* How often an empty userfaultfd is read again: adapted to the load. */
#include "pace.h"

#include "affinity.h"
#include "base.h"

#define PATIENCE 3      /* windows of reading in vain before it is given up */
#define MAX_PENALTY 63  /* quick faults before reading again is tried once more */
#define SHUN_NS 4000000 /* for so long, at first, reading again is given up on a contended core */
#define MAX_SHUN_NS 1280000000

static void set(struct uffdaemon_port *port, uint32_t number)
{
    atomic_store_explicit(&port->rereads, number, memory_order_relaxed);
}

/* Adapts the number of reads to the load.  `gap` is the time (ns) since the last answer, `tries` how
 * many empty reads came before this one.  Only a hit shows that reading again is worth while; after
 * vain attempts more and more quick faults have to come before it is tried once more. */
UFFDAEMON_HOT void uffdaemon_pace_busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries)
{
    if (tries)
        port->misses = port->penalty = 0;
    if (uffdaemon_rereads(port))
        return;
    if (gap >= UFFDAEMON_BACK_TO_BACK_NS || port->last + gap < port->shunned)
        port->quick = 0;
    else if (++port->quick > port->penalty) {
        set(port, port->reread_limit);
        port->quick = port->misses = 0;
    }
}

UFFDAEMON_COLD void uffdaemon_pace_idle(struct uffdaemon_port *port)
{
    if (!uffdaemon_rereads(port) || ++port->misses < PATIENCE)
        return;
    set(port, 0);
    port->quick = port->misses = 0;
    if (port->penalty < MAX_PENALTY)
        port->penalty = 2 * port->penalty + 1;
}

/* Somebody else had the core for a time slice, milliseconds, when it was yielded at `now`.  A sleeper
 * gets it back at once when a fault wakes it, so reading again is given up for a while: a short one
 * if it was an accident, longer and longer if the core is wanted all the time. */
UFFDAEMON_COLD void uffdaemon_pace_shun(struct uffdaemon_port *port, uint64_t now)
{
    /* Undisturbed for as long as the last time lasted: an accident again. */
    if (now - port->shunned > port->shun)
        port->shun = 0;
    port->shun = port->shun ? 2 * port->shun : SHUN_NS;
    if (port->shun > MAX_SHUN_NS)
        port->shun = MAX_SHUN_NS;
    port->shunned = now + port->shun;
    uffdaemon_affinity_give_up(now);
    set(port, 0);
    port->quick = port->misses = 0;
}
