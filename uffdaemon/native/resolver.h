/* SPDX-License-Identifier: Apache-2.0 */
/* A thread that serves any number of ports and never needs the interpreter. */
#ifndef UFFDAEMON_RESOLVER_H
#define UFFDAEMON_RESOLVER_H

#include "port.h"

struct uffdaemon_resolver;

struct uffdaemon_resolver *uffdaemon_resolver_start(int *error);
int uffdaemon_resolver_add(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port);
void uffdaemon_resolver_remove(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port);
void uffdaemon_resolver_stop(struct uffdaemon_resolver *resolver);
int uffdaemon_resolver_thread(const struct uffdaemon_resolver *resolver);

#endif
