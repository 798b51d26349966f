/* SPDX-License-Identifier: Apache-2.0 */
/* Faults that wait for the end of an event, and are tried again by C. */
#ifndef UFFDAEMON_POSTPONED_H
#define UFFDAEMON_POSTPONED_H

#include <stdint.h>

#include "base.h"
#include "port.h"

UFFDAEMON_COLD int uffdaemon_postpone(struct uffdaemon_port *port,
                                      const struct uffdaemon_record *record, uint64_t now);
UFFDAEMON_COLD void uffdaemon_tell_postponed(struct uffdaemon_port *port, uint64_t now);
void uffdaemon_want(struct uffdaemon_port *port, const struct uffdaemon_record *record);

#endif
