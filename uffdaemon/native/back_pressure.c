/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading less where what is read finds no room: Python is late, or there is no memory or no
 * descriptor.
 *
 * Messages that are not read are not lost: their threads wait.  So whoever causes events faster
 * than Python applies them is slowed down, and others are not: a resolver leaves the port alone for
 * a moment, and serves the rest.
 */
#include "back_pressure.h"

#include "pace.h"
#include "queue.h"
#include "serve.h"

/* One message is read in each pause: faults come first, and one may be what Python waits for, with
 * the GIL held.  While a fault waits for an event's end, events are read for it. */
int uffdaemon_serve_slowly(struct uffdaemon_port *port)
{
    uffdaemon_port_notify(port);
    if (uffdaemon_queue_has_room(&port->queue))
        uffdaemon_serve_once(port, 1);
    if (!port->postponed)
        return uffdaemon_pause(port);
    uffdaemon_serve_postponed(port);
    return port->postponed && uffdaemon_queue_has_room(&port->queue) ? UFFDAEMON_SERVE_MORE
                                                                     : uffdaemon_pause(port);
}
