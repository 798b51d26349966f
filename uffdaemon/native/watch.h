/* What the watchdog looks at (watchdog.c), and what it does about what it finds (bark.c). */
#ifndef UFFDAEMON_WATCH_H
#define UFFDAEMON_WATCH_H

#include "native.h"

#define LOOK 32                       /* messages, at most, in one look */
#define TOLD (LOOK + UFFDAEMON_TURN) /* what one round may tell of, so that it is told once */

struct uffdaemon_watch {
    struct uffdaemon_watch *next;
    struct uffdaemon_port *port; /* NULL: nobody serves the userfaultfd any more */
    int fd;
    uint32_t then, told_count;
    uint64_t after;
    uint32_t quiet;               /* what nobody reads has been said */
    uint64_t reads, unread_since; /* of a port that the event loop serves */
    uint64_t told[TOLD]; /* addresses */
    char name[64];
};

/* What it waits for. */
extern const char uffdaemon_ended[], uffdaemon_not_taken[], uffdaemon_at_it[];

extern int uffdaemon_stacks;

void uffdaemon_bark(struct uffdaemon_watch *watch, const struct uffd_msg *messages, size_t count,
                    uint64_t age, const char *why);

#endif
