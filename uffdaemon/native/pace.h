/* SPDX-License-Identifier: Apache-2.0 */
/* How often the serving thread rereads an empty userfaultfd: adapted to the load. */
#ifndef UFFDAEMON_PACE_H
#define UFFDAEMON_PACE_H

#include <stdatomic.h>
#include <stdint.h>

#include "port.h"

#define UFFDAEMON_BACK_TO_BACK_NS 200000 /* faults closer than this make rereading worthwhile */

static inline uint32_t uffdaemon_rereads(const struct uffdaemon_port *port)
{
    return atomic_load_explicit(&port->rereads, memory_order_relaxed);
}

void uffdaemon_pace_busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries);
void uffdaemon_pace_idle(struct uffdaemon_port *port);
void uffdaemon_pace_back_off(struct uffdaemon_port *port, uint64_t now);

/* Has the port be left alone for a moment. */
UFFDAEMON_COLD int uffdaemon_pause(struct uffdaemon_port *port);

#endif
