/* SPDX-License-Identifier: Apache-2.0 */
/* Python's operations, carried out between events. */
#ifndef UFFDAEMON_EXECUTE_H
#define UFFDAEMON_EXECUTE_H

#include "operations.h"
#include "port.h"

void uffdaemon_port_execute(struct uffdaemon_port *port, struct uffdaemon_operation *operations,
                            size_t count, uint64_t events);

#endif
