/* SPDX-License-Identifier: Apache-2.0 */
/* Resolving faults by rules. */
#ifndef UFFDAEMON_RULES_H
#define UFFDAEMON_RULES_H

#include "port.h"

void uffdaemon_resolve(struct uffdaemon_port *port, const struct uffdaemon_table *table,
                       struct uffdaemon_record *records, size_t count);

#endif
