/*
 * What the C side offers to Python.
 *
 * Conventions: a function returns 0 or a count, or -errno; progress comes back in out-parameters or
 * in the structures handed in.  No Python.h; no globals but those that a signal handler needs.  Every
 * descriptor and every address belongs to the caller, before and after the call.  cffi releases the
 * GIL around each call, and nothing here ever waits for it.
 */
#ifndef UFFDAEMON_NATIVE_H
#define UFFDAEMON_NATIVE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "uapi.h"

/* One ioctl to carry out, and what became of it.  64 bytes, packed and read by Python's struct. */
struct uffdaemon_operation {
    uint32_t code;      /* _UFFDIO_COPY, _UFFDIO_MOVE, ... */
    uint32_t error;     /* out: 0, or the errno that stopped the operation */
    uint64_t dst;       /* bytes; the start of the range for operations without a source */
    uint64_t src;       /* bytes; 0 for operations without a source */
    uint64_t length;    /* bytes */
    uint64_t mode;      /* the ioctl's own mode bits */
    uint64_t page_size; /* bytes; how far to step over a page that is present, 0: stop instead */
    uint64_t done;      /* out: bytes that this operation brought about */
    uint64_t present;   /* out: bytes that were found present, and woken unless DONTWAKE */
};
_Static_assert(sizeof(struct uffdaemon_operation) == 64, "uffdaemon_operation");

/* A policy for a range that C can carry out by itself.  112 bytes, packed by Python's struct. */
struct uffdaemon_rule {
    uint64_t kind;      /* the fault flags WP and MINOR that it answers; rules are sorted by it, */
    uint64_t start;     /* then by this (bytes) */
    uint64_t end;       /* bytes, exclusive */
    uint64_t code;      /* _UFFDIO_COPY, _UFFDIO_ZEROPAGE, ...; 0: these addresses are Python's */
    uint64_t mode;      /* the ioctl's mode bits */
    uint64_t src;       /* bytes; where the data for `start` lies, 0 for operations without */
    uint64_t origin;    /* bytes; the region's start: windows are aligned from it */
    uint64_t page_size; /* bytes, a power of two */
    uint64_t window;    /* bytes to fill around a fault, at least page_size */
    uint64_t pages;     /* address of the region's bitmap of present pages, one bit each */
    uint64_t removed;   /* the same of pages whose owner discarded them, as Python has it */
    uint64_t fresh;     /* the same of those that Python does not know of yet; 0: it knows of all */
    uint64_t zeros;     /* what is due there: 0: the same as before; 1: zeros by ZEROPAGE; else by
                           COPY from this address, where a page of zeros lies */
    uint64_t refusal;   /* what to do about a page that it cannot bring: 0: ask Python; else this
                           operation, _UFFDIO_POISON */
};
_Static_assert(sizeof(struct uffdaemon_rule) == 112, "uffdaemon_rule");

/* The rules in force, read without locks and replaced as a whole (table.c). */
struct uffdaemon_table {
    uint64_t count;
    struct uffdaemon_rule rules[];
};

/* A message, and what C did about it.  64 bytes, read by Python's struct. */
struct uffdaemon_record {
    struct uffd_msg message;
    uint32_t code;    /* 0: nothing was done, it is Python's; else the operation that answered */
    uint32_t present; /* whether the page had been there before; of events: applied already */
    uint64_t latency; /* when it was read, CLOCK_MONOTONIC ns; once answered: ns until it was */
    uint64_t done;    /* bytes that the operation brought about, in the first record that it answers */
    uint64_t error;   /* errno that kept a rule from answering, 0: none */
};
_Static_assert(sizeof(struct uffdaemon_record) == 64, "uffdaemon_record");

/* A copy that takes the place of a move: what was copied is released at the source. */
struct uffdaemon_copy {
    uint64_t dst, src, length; /* bytes */
    uint32_t flags;            /* of the following two */
    uint32_t advice;           /* MADV_* that empties the source */
    uint64_t done;             /* out: bytes copied and released */
    uint32_t error;            /* out: 0, or the errno that stopped it */
    uint32_t stage;            /* out: where, one of the following */
};
#define UFFDAEMON_EXACT 1         /* write-protect meanwhile: both are registered MISSING | WP */
#define UFFDAEMON_OTHER_PROCESS 2 /* the destination is not in our memory */
#define UFFDAEMON_SHARED 4        /* the pages of the destination are a file's */

#define UFFDAEMON_PROTECT 1
#define UFFDAEMON_COPY 2
#define UFFDAEMON_RELEASE 3
#define UFFDAEMON_UNPROTECT 4 /* writers of the destination or the source are still kept out */

#define UFFDAEMON_KINDS 8     /* by fault flags & (WP | MINOR | WRITE) */
#define UFFDAEMON_CODES 16    /* by _UFFDIO_*; 0 counts what was there before */
#define UFFDAEMON_BUCKETS 64  /* latencies: bucket n counts those below 2^n nanoseconds */
#define UFFDAEMON_MESSAGES 128
#define UFFDAEMON_TURN 16     /* messages that are remembered while Python is at them */

/* Records on their way to Python: a queue that grows, so that nobody has to wait for Python before
 * a message is read (queue.c). */
struct uffdaemon_chunk;
struct uffdaemon_queue {
    struct uffdaemon_chunk *head, *tail, *spare;
    uint64_t count;     /* records in it */
    uint64_t forwarded; /* how many of them C did nothing about */
    uint64_t since;     /* when the first of those came, CLOCK_MONOTONIC ns; 0: there is none */
    uint64_t turn_since; /* the same of those that Python has taken, and is at; 0: it is at none */
    uint32_t lock, lost;    /* lost: records dropped because there was no memory for them */
    uint32_t turn_count;
    struct uffd_msg turn[UFFDAEMON_TURN]; /* the first of what Python is at */
};

/* Who uses a port's rules.  The numbers are those of table.c. */
struct uffdaemon_readers {
    uint64_t epoch, inside[2];
};

/* A thread that waits in its signal handler until its page is there (signal.c). */
struct uffdaemon_waiter {
    struct uffdaemon_waiter *next;
    uint64_t page, since; /* bytes; CLOCK_MONOTONIC ns */
    uint32_t woken;       /* the futex */
    int32_t thread;
};

/* One userfaultfd that is served: its rules, and what has come of them.  Made and freed by port.c;
 * whoever serves it is one thread at a time, but for signal handlers. */
struct uffdaemon_port {
    int32_t fd;
    int32_t error;           /* out: errno of a failed read(2); the descriptor serves no more */
    uint32_t record_all;     /* whether answered faults are to be recorded as well */
    uint32_t applies;        /* whether events change the rules here; else rules rest until Python
                                has taken the event */
    uint32_t noted;          /* whether any rule's `fresh` has bits, under `change` */
    uint32_t closing;        /* to be left alone */
    uint32_t in_thread;      /* whether signal handlers answer as well */
    int32_t process;         /* whose it is: in a forked child nobody serves it */
    int32_t notify;          /* an eventfd that is written when there are records, or -1 */
    uint32_t notified;       /* whether it has been, since Python last took any */
    uint32_t reread_limit;   /* the most reads to try again before going to sleep */
    uint32_t rereads;        /* the same, as the load has it; 0 when idle */
    uint32_t misses;         /* how often in a row trying again was in vain */
    uint32_t quick, penalty; /* faults in quick succession, and how many it takes */
    uint64_t shun, shunned;  /* how long, and until when, reading again is given up, ns */
    uint64_t last;           /* when something was last answered, CLOCK_MONOTONIC ns */
    uint64_t reads, empty_reads; /* out: read(2) calls, and those that found nothing */
    uint64_t events;         /* out: events applied */
    uint64_t faults;         /* affinity.c: faults read */
    uint64_t reading;        /* odd while an event may have been read that is not applied yet */
    uint64_t low, high;      /* signal.c: between these lie all rules */
    uint64_t counts[UFFDAEMON_KINDS][UFFDAEMON_CODES]; /* out: faults answered */
    uint64_t latencies[UFFDAEMON_BUCKETS];             /* out */
    uint64_t bytes[UFFDAEMON_CODES];                   /* out: bytes by operation */
    struct uffdaemon_table *table;
    struct uffdaemon_readers readers;
    struct uffdaemon_queue queue;
    pthread_mutex_t change; /* held while messages are read and events applied, rules replaced */
    pthread_mutex_t executing; /* held while Python's operations are carried out, and messages read;
                                  taken before `change`, and only with patience */
    struct uffdaemon_port *next;      /* signal.c: those whose faulting threads answer */
    struct uffdaemon_waiter *waiters; /* signal.c: under `waiting` */
    uint32_t waiting, inside;         /* a spin lock; how many wait */
    uint32_t postponed;               /* how many of the following wait for an event to be over */
    uint64_t postponed_since;
    struct uffdaemon_record later[UFFDAEMON_MESSAGES];
    struct uffd_msg messages[UFFDAEMON_MESSAGES];   /* scratch */
    struct uffdaemon_record fresh[UFFDAEMON_MESSAGES]; /* scratch */
};

/* operations.c */
void uffdaemon_execute(int fd, struct uffdaemon_operation *operations, size_t count);
void uffdaemon_carry_out(int fd, struct uffdaemon_operation *operation,
                         struct uffdaemon_record *records, size_t count);

/* moves.c */
uint64_t uffdaemon_move_many(int fd, const uint64_t *moves, uint64_t *done, size_t count,
                             uint64_t mode, uint64_t low, uint64_t high);
uint64_t uffdaemon_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode);
void uffdaemon_copy_and_release(int fd, int src_fd, struct uffdaemon_copy *copy);

/* messages.c */
long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads);

/* port.c */
struct uffdaemon_port *uffdaemon_port_new(int fd, unsigned reread_limit, int notify);
void uffdaemon_port_free(struct uffdaemon_port *port);
long uffdaemon_port_take(struct uffdaemon_port *port, struct uffdaemon_record *records,
                         size_t capacity);
int uffdaemon_port_publish(struct uffdaemon_port *port, const struct uffdaemon_rule *rules,
                           size_t count, uint64_t events);
void uffdaemon_port_withdraw(struct uffdaemon_port *port);
void uffdaemon_port_forget(struct uffdaemon_port *port, uint64_t events);
void uffdaemon_port_execute(struct uffdaemon_port *port, struct uffdaemon_operation *operations,
                            size_t count, uint64_t events);
int uffdaemon_port_applies(const struct uffdaemon_port *port);
void uffdaemon_port_turn_over(struct uffdaemon_port *port);
void uffdaemon_port_settle(struct uffdaemon_port *port);
int uffdaemon_lock_patiently(pthread_mutex_t *mutex);

/* queue.c */
void uffdaemon_queue_push(struct uffdaemon_queue *queue, const struct uffdaemon_record *record,
                          uint64_t now);
long uffdaemon_queue_take(struct uffdaemon_queue *queue, struct uffdaemon_record *records,
                          size_t capacity);
uint64_t uffdaemon_queue_count(const struct uffdaemon_queue *queue);
size_t uffdaemon_queue_look(struct uffdaemon_queue *queue, struct uffd_msg *messages,
                            size_t capacity);
size_t uffdaemon_queue_look_at_turn(struct uffdaemon_queue *queue, struct uffd_msg *messages);
void uffdaemon_queue_turn_over(struct uffdaemon_queue *queue);
void uffdaemon_queue_free(struct uffdaemon_queue *queue);

/* table.c */
extern uint64_t uffdaemon_replaced; /* how often any port's rules have been */
void uffdaemon_lock(uint32_t *lock);
void uffdaemon_unlock(uint32_t *lock);
unsigned uffdaemon_enter(struct uffdaemon_readers *readers);
void uffdaemon_leave(struct uffdaemon_readers *readers, unsigned ticket);
void uffdaemon_wait_for_readers(struct uffdaemon_readers *readers);
struct uffdaemon_table *uffdaemon_table_new(size_t count);
struct uffdaemon_table *uffdaemon_table_of(struct uffdaemon_port *port);
void uffdaemon_replace(struct uffdaemon_port *port, struct uffdaemon_table *table);

/* changes.c */
void uffdaemon_change(struct uffdaemon_port *port, const struct uffd_msg *message);

/* rules.c */
const struct uffdaemon_rule *uffdaemon_find(const struct uffdaemon_table *table, uint64_t kind,
                                            uint64_t address);
void uffdaemon_set_bits(void *bitmap, uint64_t first, uint64_t end, int value);
void uffdaemon_empty_bits(void *bitmap, uint64_t first, uint64_t end);
void uffdaemon_answer(struct uffdaemon_port *port, const struct uffdaemon_table *table,
                      struct uffdaemon_record *records, size_t count);

/* serve.c */
uint64_t uffdaemon_now(void);
int uffdaemon_serve(struct uffdaemon_port *port);
void uffdaemon_notify(struct uffdaemon_port *port);

/* affinity.c */
void uffdaemon_seek(unsigned reads, uint64_t now);
void uffdaemon_seek_no_more(uint64_t now);
void uffdaemon_follow(struct uffdaemon_port *port, pid_t thread, size_t count, uint64_t now);

/* waiting.c */
int uffdaemon_wait_open(void);
int uffdaemon_wait_add(int epoll, int fd, uint64_t port);
int uffdaemon_wait_remove(int epoll, int fd);
int uffdaemon_wait(int epoll, int64_t timeout, struct uffdaemon_port **hot);

/* resolver.c */
struct uffdaemon_resolver;
struct uffdaemon_resolver *uffdaemon_resolver_start(int *error);
int uffdaemon_resolver_add(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port);
void uffdaemon_resolver_remove(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port);
void uffdaemon_resolver_stop(struct uffdaemon_resolver *resolver);
int uffdaemon_resolver_thread(const struct uffdaemon_resolver *resolver);

/* watchdog.c */
#define UFFDAEMON_REPORT 0
#define UFFDAEMON_POISON 1
#define UFFDAEMON_EXIT 2
#define UFFDAEMON_EXIT_STATUS 70 /* EX_SOFTWARE of sysexits.h */
struct uffdaemon_watch;
struct uffdaemon_watch *uffdaemon_watch_add(int fd, struct uffdaemon_port *port, uint64_t after,
                                            unsigned then, int signal, const char *name, int *error);
void uffdaemon_watch_alarm(void);
void uffdaemon_watch_wake(const struct uffdaemon_watch *watch, uint64_t start, uint64_t length);
void uffdaemon_watch_remove(struct uffdaemon_watch *watch);

/* signal.c */
int uffdaemon_signal_add(struct uffdaemon_port *port);
void uffdaemon_signal_remove(struct uffdaemon_port *port);
void uffdaemon_signal_release(struct uffdaemon_port *port, uint64_t start, uint64_t length);

/* descriptor.c */
int uffdaemon_open_syscall(int user_mode_only);
int uffdaemon_open_device(int user_mode_only);
int uffdaemon_handshake(int fd, uint64_t *features, uint64_t *ioctls);
int uffdaemon_register(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls);
int uffdaemon_unregister(int fd, uint64_t start, uint64_t length);
int uffdaemon_pidfd_open(int pid);
int uffdaemon_pidfd_getfd(int pidfd, int target);
int uffdaemon_memfd_create(const char *name, uint64_t huge_page_size);

/* memory.c */
#define UFFDAEMON_MAP_SHARED 1
#define UFFDAEMON_MAP_HUGETLB 2
int uffdaemon_map(int fd, uint64_t length, unsigned kind, uint64_t alignment, uint64_t *start);
int uffdaemon_unmap(uint64_t start, uint64_t length);
int uffdaemon_protect(uint64_t start, uint64_t length);
int uffdaemon_remap(uint64_t start, uint64_t length, uint64_t target);
int uffdaemon_advise(uint64_t start, uint64_t length, int advice);
int uffdaemon_mincore(uint64_t start, uint64_t length, unsigned char *vector);
void uffdaemon_copy_memory(void *dst, const void *src, size_t length);
void uffdaemon_touch(uint64_t start, uint64_t length, uint64_t step, int write);
long uffdaemon_scan(int pagemap, struct pm_scan_arg *argument);

#endif
