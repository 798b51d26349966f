/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Serving one userfaultfd: reading what is pending, resolving it by rules, and rereading for a
 * while, since a thread that has just been woken is likely to fault again.
 */
#include "serve.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "affinity.h"
#include "base.h"
#include "events.h"
#include "grace.h"
#include "journal.h"
#include "messages.h"
#include "pace.h"
#include "postponed.h"
#include "queue.h"
#include "record.h"
#include "rules.h"
#include "table.h"

#define TURN_NS 250000      /* then other userfaultfds, and the loop, get their turn */
#define CONTENDED_NS 300000 /* a yield that takes longer: another thread wants the core */
#define ENTER 1000          /* yields between two reads while faulting threads wait to resolve */
#define LONG_POSTPONED_NS 200000000 /* after this, Python lists the fault as well */

/* Queues records for Python, or postpones them. */
static UFFDAEMON_HOT void enqueue(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    int all = atomic_load_explicit(&port->record_all, memory_order_relaxed) != 0, forwarded = 0;

    for (size_t index = 0; index < count; index++) {
        const struct uffdaemon_record *record = &port->batch[index];

        if (record->code ? !all && !record->error : uffdaemon_postpone(port, record, now))
            continue;
        forwarded |= !record->code;
        uffdaemon_queue_push(&port->queue, record, now);
    }
    if (forwarded)
        uffdaemon_port_notify(port);
}

/* Only the serving thread writes `reading`; only signal handlers in faulting threads read it. */
static void toggle_reading(struct uffdaemon_port *port)
{
    uint64_t reading = atomic_load_explicit(&port->reading, memory_order_relaxed);

    atomic_store_explicit(&port->reading, reading + 1, memory_order_release);
}

/* The thread that caused an event continues once it is read: operations of others must end
 * before. */
static void begin_reading(struct uffdaemon_port *port)
{
    if (atomic_load_explicit(&port->in_thread, memory_order_acquire)) {
        /* Threads that wait for the last event to be applied go before the next one. */
        for (unsigned tries = 0; atomic_load(&port->entering) && tries < ENTER; tries++)
            sched_yield();
        atomic_fetch_add(&port->reading, 1);
        uffdaemon_synchronize(&port->rules.readers);
    } else {
        toggle_reading(port); /* no atomic operation: it has no readers */
    }
}

/* Resolves what the rules cover.  `locked`: `change` is held, so they are not replaced. */
static UFFDAEMON_HOT void resolve(struct uffdaemon_port *port, size_t count, uint64_t now,
                                  int locked)
{
    unsigned ticket = locked ? 0 : uffdaemon_read_lock(&port->rules.readers);
    const struct uffdaemon_table *table = uffdaemon_table_load(&port->rules);

    if (table)
        uffdaemon_resolve(port, table, port->batch, count);
    if (!locked)
        uffdaemon_read_unlock(&port->rules.readers, ticket);
    enqueue(port, count, now);
}

/* Turns the messages into records in place: from the last one on, since records are longer. */
static void make_records(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    for (size_t index = count; index--;) {
        struct uffd_msg message = port->messages[index];

        port->batch[index] = (struct uffdaemon_record){.message = message, .latency = now};
    }
}

static int has_events(const struct uffdaemon_port *port, size_t count)
{
    for (size_t index = 0; index < count; index++)
        if (port->batch[index].message.event != UFFD_EVENT_PAGEFAULT)
            return 1;
    return 0;
}

/* Handles a batch.  Events come first: they must be applied before faults are resolved.  The kernel
 * returns faults before older events, but refuses operations until those are read. */
static UFFDAEMON_HOT void handle(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    size_t faults = count;

    make_records(port, count, now);
    if (has_events(port, count))
        faults = uffdaemon_handle_events(port, count, now);
    else if (port->journal)
        uffdaemon_journal_keep(port->journal, count, 0);
    toggle_reading(port);
    if (faults && port->notify >= 0)
        uffdaemon_affinity_follow(
            &port->faults, (pid_t)port->batch[0].message.arg.pagefault.feat.ptid, faults, now);
    resolve(port, faults, now, 1);
}

/* A counter that only the serving thread writes. */
static void count_one(_Atomic uint64_t *counter)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
                          memory_order_relaxed);
}

/* Whether a fault's thread is unknown. */
static int has_no_thread(const struct uffd_msg *message)
{
    return message->event == UFFD_EVENT_PAGEFAULT && !message->arg.pagefault.feat.ptid;
}

static UFFDAEMON_HOT long read_messages(struct uffdaemon_port *port, size_t count)
{
    size_t bytes = count * sizeof(port->messages[0]);

    if (port->journal)
        return uffdaemon_journal_read(port->journal, port->fd, port->messages, bytes);
    return uffdaemon_read_pending(port->fd, port->messages, bytes);
}

/* Reads at most `count` messages, and resolves them.  Returns the bytes read, or -errno.  `change`
 * is held from reading
 * events until they are applied.  `executing` is only tried for a while: its holder may wait for a
 * fault of this port. */
static long read_and_resolve(struct uffdaemon_port *port, size_t count, unsigned tries)
{
    ssize_t bytes;
    uint64_t now;
    int locked = uffdaemon_timedlock(&port->executing) == 0;

    uffdaemon_lock(&port->change);
    begin_reading(port);
    bytes = read_messages(port, count);
    count_one(&port->reads);
    if (bytes <= 0)
        toggle_reading(port);
    if (bytes > 0) {
        now = uffdaemon_now();
        uffdaemon_pace_busy(port, now - port->last, tries);
        if (port->notify >= 0 && bytes == sizeof(struct uffd_msg) &&
            now - port->last < UFFDAEMON_BACK_TO_BACK_NS && has_no_thread(&port->messages[0]))
            uffdaemon_affinity_search(tries, now);
        handle(port, (size_t)bytes / sizeof(struct uffd_msg), now);
        port->last = now;
    } else {
        bytes = bytes ? -errno : -EIO;
    }
    uffdaemon_unlock(&port->change);
    if (locked)
        uffdaemon_unlock(&port->executing);
    return bytes;
}

/* Retries the faults that were postponed because of a pending event. */
static UFFDAEMON_COLD void retry_postponed(struct uffdaemon_port *port)
{
    uint64_t since = port->postponed_since, now = uffdaemon_now();
    size_t count = port->postponed;

    memcpy(port->batch, port->later, count * sizeof(port->later[0]));
    port->postponed = 0;
    resolve(port, count, now, 0);
    port->postponed_since = since;
    if (port->postponed && now - since > LONG_POSTPONED_NS)
        uffdaemon_tell_postponed(port, now);
}

/* Tries the pages that faulting threads could not fill, since events are pending all the time. */
static UFFDAEMON_COLD void take_wanted(struct uffdaemon_port *port)
{
    size_t found = 0;
    uint64_t now = uffdaemon_now();

    for (size_t index = 0; index < UFFDAEMON_WANTED; index++) {
        uint64_t page = __atomic_exchange_n(&port->wanted[index], 0, __ATOMIC_ACQ_REL);
        struct uffdaemon_record record = {.latency = now};

        if (!page || port->postponed + found >= UFFDAEMON_MESSAGES)
            continue;
        record.message.event = UFFD_EVENT_PAGEFAULT;
        record.message.arg.pagefault.address = page & ~(uint64_t)3;
        record.message.arg.pagefault.flags = page & 2 ? UFFD_PAGEFAULT_FLAG_MINOR : 0;
        port->batch[found++] = record;
    }
    if (found)
        resolve(port, found, now, 0);
}

/* Reads, and retries postponed faults, in turn. */
UFFDAEMON_COLD void uffdaemon_serve_postponed(struct uffdaemon_port *port)
{
    struct uffdaemon_naps naps;
    uint64_t begun = uffdaemon_now(), spin, now;
    long bytes = port->nap ? -EAGAIN : 1;

    uffdaemon_naps_begin(&naps);
    naps.limit += port->nap;
    do {
        spin = uffdaemon_nap(&naps, bytes > 0);
        now = uffdaemon_now();
        do
            retry_postponed(port);
        while (port->postponed && uffdaemon_now() - now < spin);
        if (port->postponed && uffdaemon_queue_has_room(&port->queue))
            bytes = read_and_resolve(port, 1, 1);
    } while (port->postponed && now - begun < TURN_NS);
    port->nap = port->postponed && bytes < 0 ? naps.limit : 0;
    uffdaemon_naps_end(&naps);
}

/* Reads and resolves until the rereads find nothing, enough records wait for Python, or the turn is
 * over.  Sleeps for at most two milliseconds, if an event is pending.  Returns an
 * enum uffdaemon_turn. */
UFFDAEMON_HOT int uffdaemon_serve(struct uffdaemon_port *port)
{
    uint64_t now = uffdaemon_now(), begun = now, before;
    unsigned tries = 0;

    while (!atomic_load_explicit(&port->closing, memory_order_relaxed)) {
        long bytes;

        if (uffdaemon_queue_count(&port->queue) >=
            atomic_load_explicit(&port->queue.limit, memory_order_relaxed))
            return port->notify < 0 ? UFFDAEMON_SERVE_DONE : UFFDAEMON_SERVE_FULL;
        /* Postponed faults are retried as soon as one event has been read. */
        bytes = read_and_resolve(port, port->postponed ? 1 : UFFDAEMON_MESSAGES, tries);
        if (uffdaemon_may_pass(bytes)) {
            /* For an event that brings a descriptor, there is one to spare. */
            if (bytes != -ENOBUFS && uffdaemon_spare_close(&port->spare))
                continue;
            return uffdaemon_pause(port);
        }
        if (bytes < 0 && bytes != -EAGAIN && bytes != -EINTR) {
            atomic_store_explicit(&port->error, (int32_t)-bytes, memory_order_relaxed);
            uffdaemon_port_notify(port);
            return 0;
        }
        if (atomic_load_explicit(&port->in_thread, memory_order_relaxed))
            take_wanted(port);
        if (port->postponed) {
            uffdaemon_serve_postponed(port);
            return port->postponed > 0;
        }
        if (bytes < 0) {
            count_one(&port->empty_reads);
            if (tries++ >= uffdaemon_rereads(port)) {
                uffdaemon_pace_idle(port);
                return 0;
            }
            before = tries == 1 ? uffdaemon_now() : now;
            sched_yield();
            now = uffdaemon_now();
            if (now - before > CONTENDED_NS)
                uffdaemon_pace_back_off(port, now);
            continue;
        }
        now = port->last;
        tries = 0;
        if (now - begun > TURN_NS)
            return uffdaemon_rereads(port) > 0;
    }
    return 0;
}

/* Reads once, at most `count` messages.  By the serving thread, or while none serves the port. */
void uffdaemon_serve_once(struct uffdaemon_port *port, size_t count)
{
    if (uffdaemon_may_pass(read_and_resolve(port, port->postponed ? 1 : count, 1)))
        uffdaemon_spare_close(&port->spare);
    if (atomic_load_explicit(&port->in_thread, memory_order_relaxed))
        take_wanted(port);
}
