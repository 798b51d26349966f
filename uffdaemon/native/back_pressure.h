/* SPDX-License-Identifier: Apache-2.0 */
/* Reading less where what is read finds no room. */
#ifndef UFFDAEMON_BACK_PRESSURE_H
#define UFFDAEMON_BACK_PRESSURE_H

#include "base.h"
#include "port.h"

UFFDAEMON_COLD int uffdaemon_serve_slowly(struct uffdaemon_port *port);

#endif
