/* SPDX-License-Identifier: Apache-2.0 */
/* Serving one userfaultfd: read, apply events, resolve, and read again. */
#ifndef UFFDAEMON_SERVE_H
#define UFFDAEMON_SERVE_H

#include "port.h"

int uffdaemon_serve(struct uffdaemon_port *port);
void uffdaemon_serve_once(struct uffdaemon_port *port, size_t count);
void uffdaemon_serve_postponed(struct uffdaemon_port *port);

#endif
