/* SPDX-License-Identifier: Apache-2.0 */
/* Reports of stalled faults, and the action declared for them. */
#ifndef UFFDAEMON_STALL_H
#define UFFDAEMON_STALL_H

#include "watchdog.h"

#define UFFDAEMON_REPORT_MAX 32 /* messages in one report */
#define UFFDAEMON_REPORTED (UFFDAEMON_REPORT_MAX + UFFDAEMON_OUTSTANDING)

enum uffdaemon_stall {
    UFFDAEMON_STALL_OWNER_ENDED,
    UFFDAEMON_STALL_NOT_DEQUEUED,
    UFFDAEMON_STALL_OUTSTANDING,
};

struct uffdaemon_watch {
    /* Constant. */
    struct uffdaemon_port *port; /* NULL: the userfaultfd is no longer served */
    int fd;
    uint32_t then;  /* enum uffdaemon_watch_action */
    uint64_t after; /* ns */
    int stacks;     /* the signal on which faulthandler writes a thread's stack; 0: none */
    char name[64];

    /* Under the watchdog's lock. */
    struct uffdaemon_watch *next;
    uint32_t quiet;               /* unread messages have been reported */
    uint64_t reads, unread_since; /* if the event loop serves the port */
    uint32_t reported_count;
    uint64_t reported[UFFDAEMON_REPORTED]; /* addresses: each is reported once */
    uint32_t reread_count, doomed_count;
    uint64_t reread[UFFDAEMON_REPORT_MAX]; /* addresses to wake, so that threads fault again, */
    uint64_t doomed[UFFDAEMON_REPORT_MAX]; /* and to poison, once the report has been written */
};

void uffdaemon_stall_report(struct uffdaemon_watch *watch, const struct uffd_msg *messages,
                            size_t count, uint64_t age, enum uffdaemon_stall stall);
void uffdaemon_stall_act(struct uffdaemon_watch *watch);
void uffdaemon_stall_forget(void);
void uffdaemon_stall_write(void);
void uffdaemon_stall_set_stack_pipe(int fd);
void uffdaemon_stall_wake(const struct uffdaemon_watch *watch, uint64_t start, uint64_t length);

#endif
