/* SPDX-License-Identifier: Apache-2.0 */
/* Applying events to rules and page states, without Python. */
#ifndef UFFDAEMON_EVENTS_H
#define UFFDAEMON_EVENTS_H

#include "port.h"

void uffdaemon_apply_event(struct uffdaemon_port *port, struct uffdaemon_record *record);

#endif
