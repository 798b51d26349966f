/* SPDX-License-Identifier: Apache-2.0 */
/* A thread that reports every fault that Python has not dequeued, or not finished, in time. */
#ifndef UFFDAEMON_WATCHDOG_H
#define UFFDAEMON_WATCHDOG_H

#include "port.h"

/* What to do about a stalled fault, besides reporting it. */
enum uffdaemon_watch_action {
    UFFDAEMON_REPORT = 0,
    UFFDAEMON_POISON = 1,
    UFFDAEMON_EXIT = 2,
};
#define UFFDAEMON_EXIT_STATUS 70 /* EX_SOFTWARE of sysexits.h */

struct uffdaemon_watch;

struct uffdaemon_watch *uffdaemon_watch_add(int fd, struct uffdaemon_port *port, uint64_t after,
                                            unsigned then, int signal, const char *name,
                                            int *error);
void uffdaemon_watch_remove(struct uffdaemon_watch *watch);

#endif
