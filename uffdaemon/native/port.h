/* SPDX-License-Identifier: Apache-2.0 */
/* One served userfaultfd: its rules, its records and its counters. */
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
#define UFFDAEMON_DEFERRED 1 /* a code that resolves no fault: counts those that events delayed */
#define UFFDAEMON_BUCKETS 64 /* latencies: bucket n counts those below 2^n nanoseconds */
#define UFFDAEMON_MESSAGES 128
#define UFFDAEMON_DISCARDS 1024
#define UFFDAEMON_WANTED 16
#define UFFDAEMON_RELEASES \
    2 /* the source of the one copy that runs, and its target if it is undone */
#define UFFDAEMON_ENOUGH 384 /* records after which Python gets its turn, if it serves the port */
#define UFFDAEMON_FULL 2048  /* records beyond which a resolver reads slowly */
#define UFFDAEMON_PORT_ALIGNMENT 4096

/* What is next for a port that has been served. */
enum uffdaemon_turn {
    UFFDAEMON_SERVE_DONE = 0,
    UFFDAEMON_SERVE_MORE = 1,   /* more is to be done at once */
    UFFDAEMON_SERVE_PAUSED = 2, /* nothing until `resume` */
    UFFDAEMON_SERVE_FULL = 3,   /* messages have to be read slowly */
};

struct uffdaemon_journal;

/*
 * Locks, in the order in which they are taken:
 *  `executing`  held while Python's operations are carried out, and from a read(2) until its batch
 *               has been handled.  Only tried for 20 ms: an operation may wait for a fault of this
 *               port
 *  `change`     held while messages are read and events applied, and while rules are replaced
 * One thread serves a port at a time; faulting threads may resolve their own faults meanwhile.
 */
struct uffdaemon_port {
    /* Constant after initialization. */
    int32_t fd;
    int32_t notify;                    /* an eventfd, written when there are records; or -1 */
    int32_t process;                   /* its process: a forked child does not serve it */
    uint32_t reread_limit;             /* upper bound of `rereads` */
    struct uffdaemon_journal *journal; /* or NULL */

    /* Switches and results that any thread may read. */
    _Atomic uint32_t record_all; /* whether resolved faults are recorded as well */
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
    _Atomic uint64_t reading; /* odd while an event may have been read but not applied */

    struct uffdaemon_rules rules; /* replaced under `change` */

    /* Private to the serving thread: how often it rereads (pace.c). */
    uint32_t misses;               /* consecutive rounds of rereads that found nothing */
    uint32_t quick, penalty;       /* faults in quick succession, and how many are needed */
    uint32_t postponed;            /* faults in `later` */
    uint64_t backoff, backoff_end; /* how long, and until when, not to reread, ns */
    uint64_t last;                 /* when the last batch was read, CLOCK_MONOTONIC ns */
    uint64_t faults;               /* read so far (affinity.c) */

    uint32_t is_hot; /* in the list of those that are not to be slept over: epoll.c */
    uint32_t paused; /* not waited for until `resume`, CLOCK_MONOTONIC ns */
    struct uffdaemon_port *next_hot;
    uint64_t resume;
    _Atomic int32_t spare; /* a descriptor to close for that of a FORK event; -1: none */

    /* In-thread: those who wait for Python in their handler. */
    struct uffdaemon_port *_Atomic next; /* in the list of sigbus.c, under its lock */
    struct uffdaemon_wait_queue waiting;
    _Atomic uint32_t inside;   /* how many threads wait */
    _Atomic uint32_t entering; /* and how many for an event to be applied, to read the rules */
    uint64_t wanted[UFFDAEMON_WANTED]; /* pages for the serving thread to try, or 0: only it can act
                                          right after a read; lowest bits: set, a minor fault */

    /* Counters, read by any thread.  Several threads add to the arrays with __atomic builtins: cffi
     * does not accept arrays of _Atomic. */
    _Atomic uint64_t reads, empty_reads;   /* read(2) calls, and how many found nothing */
    uint64_t bytes[UFFDAEMON_CODES];       /* by operation */
    uint64_t latencies[UFFDAEMON_BUCKETS]; /* faults */
    uint64_t counts[UFFDAEMON_KINDS][UFFDAEMON_CODES]; /* faults resolved */

    struct uffdaemon_queue queue;

    /* Private to the serving thread: messages as read, turned into records in place.  The first
     * is on the page that holds everything a fault needs. */
    union {
        struct uffd_msg messages[UFFDAEMON_MESSAGES];
        struct uffdaemon_record batch[UFFDAEMON_MESSAGES];
    };

    /* Ranges that exact copies are emptying: under `change`. */
    struct {
        uint64_t start, end; /* bytes; equal: none */
    } releases[UFFDAEMON_RELEASES];

    /* The last events, under `change`: a decision made before one is void where it is about the
     * same pages.  Of those that change more than the contents of pages, only when the last one
     * was. */
    uint64_t rearranged; /* its number */
    uint64_t unbooked; /* that of the last one whose pages no rule covers: Python has to apply it */
    struct {
        uint64_t start, end;        /* bytes */
    } discards[UFFDAEMON_DISCARDS]; /* by the number of the event */

    /* Faults to retry once an event is over. */
    uint64_t postponed_since; /* CLOCK_MONOTONIC ns */
    uint64_t nap;             /* between two tries, ns; 0: short ones */
    struct uffdaemon_record later[UFFDAEMON_MESSAGES];
} __attribute__((aligned(UFFDAEMON_PORT_ALIGNMENT)));
_Static_assert(offsetof(struct uffdaemon_port, batch) + sizeof(struct uffdaemon_record) <=
                   UFFDAEMON_PORT_ALIGNMENT,
               "all that a fault needs is on one page");

struct uffdaemon_port *uffdaemon_port_new(int fd, unsigned reread_limit, int notify);
void uffdaemon_port_close_spare(struct uffdaemon_port *port);
void uffdaemon_port_free(struct uffdaemon_port *port);
long uffdaemon_port_dequeue(struct uffdaemon_port *port, struct uffdaemon_record *records,
                            size_t capacity);
int uffdaemon_port_publish(struct uffdaemon_port *port, const struct uffdaemon_rule *rules,
                           size_t count, uint64_t events);
void uffdaemon_port_withdraw(struct uffdaemon_port *port);
void uffdaemon_port_withdraw_pages(struct uffdaemon_port *port,
                                   const struct uffdaemon_pages *pages);
void uffdaemon_port_withdraw_source(struct uffdaemon_port *port, uint64_t start, uint64_t end);
void uffdaemon_port_expect_release(struct uffdaemon_port *port, uint64_t start, uint64_t end);
void uffdaemon_port_end_release(struct uffdaemon_port *port, uint64_t start, uint64_t end);
void uffdaemon_port_end_batch(struct uffdaemon_port *port);
void uffdaemon_port_settle(struct uffdaemon_port *port);
void uffdaemon_port_hand_over(struct uffdaemon_port *port);
void uffdaemon_port_notify(struct uffdaemon_port *port);
void uffdaemon_port_wake(struct uffdaemon_port *port, uint64_t start, uint64_t length);

#endif
