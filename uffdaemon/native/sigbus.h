/* SPDX-License-Identifier: Apache-2.0 */
/* Faulting threads that resolve their faults themselves, in a signal handler. */
#ifndef UFFDAEMON_SIGBUS_H
#define UFFDAEMON_SIGBUS_H

#include "port.h"

int uffdaemon_sigbus_add(struct uffdaemon_port *port);
void uffdaemon_sigbus_remove(struct uffdaemon_port *port);

#endif
