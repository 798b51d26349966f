/* SPDX-License-Identifier: Apache-2.0 */
/* One userfaultfd that is served: its rules, and what has come of them. */
#ifndef UFFDAEMON_PORT_H
#define UFFDAEMON_PORT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base.h"
#include "operations.h"
#include "queue.h"
#include "record.h"
#include "table.h"
#include "waitqueue.h"

#define UFFDAEMON_KINDS 8    /* by fault flags & (WP | MINOR | WRITE) */
#define UFFDAEMON_CODES 16   /* by _UFFDIO_*; 0 counts pages that were present before */
#define UFFDAEMON_BUCKETS 64 /* latencies: bucket n counts those below 2^n nanoseconds */
#define UFFDAEMON_MESSAGES 128
#define UFFDAEMON_PORT_ALIGNMENT 4096

/*
 * Locks, in the order in which they are taken:
 *  `executing`  while Python's operations are carried out, and over a read(2) and what follows it;
 *               with patience only, since an operation may wait for a fault of this port
 *  `change`     while messages are read and events applied, and while rules are replaced
 * One thread serves a port at a time; faulting threads may resolve their own faults beside it.
 */
struct uffdaemon_port {
    /* Constant once it has been made. */
    int32_t fd;
    int32_t notify;        /* an eventfd that is written when there are records, or -1 */
    int32_t process;       /* whose it is: nobody serves it in a forked child */
    uint32_t reread_limit; /* the most reads to repeat before going to sleep */

    /* Switches and results that any thread may read. */
    _Atomic uint32_t record_all; /* whether resolved faults are recorded as well */
    _Atomic uint32_t applies;    /* whether C applies events; else rules rest until Python has */
    _Atomic uint32_t closing;    /* nobody may serve it any more */
    _Atomic uint32_t in_thread;  /* whether faulting threads resolve faults as well */
    _Atomic int32_t error;       /* errno of a failed read(2); the descriptor serves no more */
    _Atomic uint32_t notified;   /* whether `notify` was written since records were dequeued */
    _Atomic uint32_t rereads;    /* reads to repeat, adapted to the load; 0 when idle */

    struct uffdaemon_mutex change;
    struct uffdaemon_mutex executing;

    /* Written under `change`, read without it. */
    _Atomic uint32_t noted;   /* whether any rule's `fresh` has bits */
    _Atomic uint64_t events;  /* applied */
    _Atomic uint64_t reading; /* odd while an event may have been read that is not applied yet */

    struct uffdaemon_rules rules; /* replaced under `change` */

    /* The serving thread's own: its pace. */
    uint32_t misses;         /* windows of repeated reads in vain, in a row */
    uint32_t quick, penalty; /* faults in quick succession, and how many it takes */
    uint32_t postponed;      /* how many faults there are in `later` */
    uint64_t shun, shunned;  /* how long, and until when, reads are not repeated, ns */
    uint64_t last;           /* when a batch was read last, CLOCK_MONOTONIC ns */
    uint64_t faults;         /* read so far (affinity.c) */

    /* In-thread: those who wait for Python in their handler. */
    struct uffdaemon_port *_Atomic next; /* in the list of sigbus.c, under its lock */
    struct uffdaemon_wait_queue waiting;
    _Atomic uint32_t inside; /* how many threads wait */

    /* Counters, for anybody to read.  Arrays that several threads add to by __atomic builtins: cffi
     * does not take arrays of _Atomic. */
    _Atomic uint64_t reads, empty_reads;   /* read(2) calls, and those that found nothing */
    uint64_t bytes[UFFDAEMON_CODES];       /* by operation */
    uint64_t latencies[UFFDAEMON_BUCKETS]; /* faults */
    uint64_t counts[UFFDAEMON_KINDS][UFFDAEMON_CODES]; /* faults resolved */

    struct uffdaemon_queue queue;

    /* The serving thread's own: messages as they are read, and the records that they become in the
     * same place.  The first begins on the page on which all lies that a fault needs. */
    union {
        struct uffd_msg messages[UFFDAEMON_MESSAGES];
        struct uffdaemon_record batch[UFFDAEMON_MESSAGES];
    };

    /* Faults to retry once an event is over. */
    uint64_t postponed_since; /* CLOCK_MONOTONIC ns */
    struct uffdaemon_record later[UFFDAEMON_MESSAGES];
} __attribute__((aligned(UFFDAEMON_PORT_ALIGNMENT)));
_Static_assert(offsetof(struct uffdaemon_port, batch) + sizeof(struct uffdaemon_record) <=
                   UFFDAEMON_PORT_ALIGNMENT,
               "what a fault needs lies on one page");

/* Whether events change the rules here, which Python may end at any time. */
static inline int uffdaemon_port_applies(const struct uffdaemon_port *port)
{
    return atomic_load_explicit(&port->applies, memory_order_relaxed) != 0;
}

struct uffdaemon_port *uffdaemon_port_new(int fd, unsigned reread_limit, int notify);
void uffdaemon_port_free(struct uffdaemon_port *port);
long uffdaemon_port_dequeue(struct uffdaemon_port *port, struct uffdaemon_record *records,
                            size_t capacity);
int uffdaemon_port_publish(struct uffdaemon_port *port, const struct uffdaemon_rule *rules,
                           size_t count, uint64_t events);
void uffdaemon_port_withdraw(struct uffdaemon_port *port);
void uffdaemon_port_leave_events(struct uffdaemon_port *port);
void uffdaemon_port_execute(struct uffdaemon_port *port, struct uffdaemon_operation *operations,
                            size_t count, uint64_t events);
void uffdaemon_port_end_batch(struct uffdaemon_port *port);
void uffdaemon_port_settle(struct uffdaemon_port *port);
void uffdaemon_port_notify(struct uffdaemon_port *port);
void uffdaemon_port_wake(struct uffdaemon_port *port, uint64_t start, uint64_t length);

#endif
