/* SPDX-License-Identifier: Apache-2.0 */
/* Faulting threads that resolve by rules do so between two reads, once events have been applied. */
#ifndef UFFDAEMON_READING_H
#define UFFDAEMON_READING_H

#include "port.h"

void uffdaemon_wait_for_events(const struct uffdaemon_port *port);
unsigned uffdaemon_enter(struct uffdaemon_port *port);

#endif
