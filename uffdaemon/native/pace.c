/* SPDX-License-Identifier: Apache-2.0 */
/* How often an empty userfaultfd is reread: adapted to the load. */
#define _GNU_SOURCE
#include "pace.h"

#include <time.h>

#include "affinity.h"
#include "base.h"

#define PATIENCE 3         /* rounds of rereads that find nothing before giving up */
#define MAX_PENALTY 63     /* quick faults before rereading is tried again, at most */
#define BACKOFF_NS 4000000 /* first pause of rereading on a contended core */
#define MAX_BACKOFF_NS 1280000000
#define PAUSE_NS 1000000 /* where what is read finds no room */

static void set(struct uffdaemon_port *port, uint32_t number)
{
    atomic_store_explicit(&port->rereads, number, memory_order_relaxed);
}

/* Adapts the number of rereads after a batch.  `gap` is the time since the previous one (ns),
 * `tries` the number of empty reads before it.  Only a hit shows that rereading pays; each
 * failure doubles the number of quick faults before the next attempt. */
UFFDAEMON_HOT void uffdaemon_pace_busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries)
{
    if (tries)
        port->misses = port->penalty = 0;
    if (uffdaemon_rereads(port))
        return;
    if (gap >= UFFDAEMON_BACK_TO_BACK_NS || port->last + gap < port->backoff_end)
        port->quick = 0;
    else if (++port->quick > port->penalty) {
        set(port, port->reread_limit);
        port->quick = port->misses = 0;
    }
}

/* All rereads of a round have found nothing. */
UFFDAEMON_COLD void uffdaemon_pace_idle(struct uffdaemon_port *port)
{
    if (!uffdaemon_rereads(port) || ++port->misses < PATIENCE)
        return;
    set(port, 0);
    port->quick = port->misses = 0;
    if (port->penalty < MAX_PENALTY)
        port->penalty = 2 * port->penalty + 1;
}

/* Without room, memory or a descriptor.  A resolver serves others meanwhile. */
int uffdaemon_pause(struct uffdaemon_port *port)
{
    if (port->notify < 0) {
        nanosleep(&(struct timespec){0, PAUSE_NS}, NULL);
        return port->postponed ? UFFDAEMON_SERVE_MORE : UFFDAEMON_SERVE_DONE;
    }
    port->resume = uffdaemon_now() + PAUSE_NS;
    return UFFDAEMON_SERVE_PAUSED;
}

/* A yield at `now` gave another thread the core for a whole time slice, milliseconds.  A sleeper
 * gets the core back as soon as a fault wakes it, so rereading pauses: briefly at first, twice
 * as long each time if the core stays contended. */
UFFDAEMON_COLD void uffdaemon_pace_back_off(struct uffdaemon_port *port, uint64_t now)
{
    /* Not contended for as long as the last pause: start from the shortest again. */
    if (now - port->backoff_end > port->backoff)
        port->backoff = 0;
    port->backoff = port->backoff ? 2 * port->backoff : BACKOFF_NS;
    if (port->backoff > MAX_BACKOFF_NS)
        port->backoff = MAX_BACKOFF_NS;
    port->backoff_end = now + port->backoff;
    uffdaemon_affinity_give_up(now);
    set(port, 0);
    port->quick = port->misses = 0;
}
