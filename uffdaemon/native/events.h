/* SPDX-License-Identifier: Apache-2.0 */
/* Applying events to rules and page states, without Python. */
#ifndef UFFDAEMON_EVENTS_H
#define UFFDAEMON_EVENTS_H

#include <stddef.h>
#include <stdint.h>

#include "port.h"

int uffdaemon_apply_event(struct uffdaemon_port *port, struct uffdaemon_record *record);
size_t uffdaemon_handle_events(struct uffdaemon_port *port, size_t count, uint64_t now);

#endif
