/* SPDX-License-Identifier: Apache-2.0 */
/* How often an empty userfaultfd is read again: adapted to the load, by the serving thread. */
#ifndef UFFDAEMON_PACE_H
#define UFFDAEMON_PACE_H

#include <stdatomic.h>
#include <stdint.h>

#include "port.h"

#define UFFDAEMON_BACK_TO_BACK_NS 200000 /* closer faults make reading again worth while */

static inline uint32_t uffdaemon_rereads(const struct uffdaemon_port *port)
{
    return atomic_load_explicit(&port->rereads, memory_order_relaxed);
}

void uffdaemon_pace_busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries);
void uffdaemon_pace_idle(struct uffdaemon_port *port);
void uffdaemon_pace_shun(struct uffdaemon_port *port, uint64_t now);

#endif
