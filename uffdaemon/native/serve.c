/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Serving one userfaultfd: reading what is pending, answering it by rules, and trying again for a
 * while, since who has just been answered is likely to fault again.
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
#include "queue.h"
#include "record.h"
#include "rules.h"
#include "snapshot.h"
#include "table.h"

#define TURN_NS 250000         /* a busy userfaultfd lets the others, and the loop, have a look */
#define BACK_TO_BACK_NS 200000 /* faults closer than this make reading again worth while */
#define PATIENCE 3             /* windows of reading in vain before it is given up */
#define MAX_PENALTY 63         /* quick faults before reading again is tried once more */
#define CONTENDED_NS 300000    /* a yield that takes so long: somebody else wants the core */
#define SHUN_NS 4000000        /* for so long, at first, reading again is given up then */
#define MAX_SHUN_NS 1280000000
#define ENOUGH 384                 /* records after which Python is to have its turn */
#define POSTPONE_NS 30000          /* between two tries while an event is in flight */
#define MAX_POSTPONED_NS 200000000 /* after this, it is Python's to say why a thread waits */

/* Keeps a fault to be tried again here: an event is in flight, which is over as soon as the thread
 * that caused it has run.  Returns whether it did. */
static int postpone(struct uffdaemon_port *port, const struct uffdaemon_record *record,
                    uint64_t now)
{
    if (!uffdaemon_port_applies(port) || record->error != EAGAIN ||
        port->postponed == UFFDAEMON_MESSAGES)
        return 0;
    if (!port->postponed)
        port->postponed_since = now;
    else if (now - port->postponed_since > MAX_POSTPONED_NS)
        return 0;
    port->later[port->postponed++] = *record;
    port->later[port->postponed - 1].error = 0;
    return 1;
}

/* Hands on what has been looked at: to Python, or to a later try. */
static void hand_on(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    int all = atomic_load_explicit(&port->record_all, memory_order_relaxed) != 0, forwarded = 0;

    for (size_t index = 0; index < count; index++) {
        const struct uffdaemon_record *record = &port->batch[index];

        if (record->code ? !all && !record->error : postpone(port, record, now))
            continue;
        forwarded |= !record->code;
        uffdaemon_queue_push(&port->queue, record, now);
    }
    if (forwarded)
        uffdaemon_port_notify(port);
}

static void answer(struct uffdaemon_port *port, size_t count, uint64_t now)
{
    unsigned ticket = uffdaemon_read_lock(&port->rules.readers);
    const struct uffdaemon_table *table = uffdaemon_table_load(&port->rules);

    if (table)
        uffdaemon_resolve(port, table, port->batch, count);
    uffdaemon_read_unlock(&port->rules.readers, ticket);
    hand_on(port, count, now);
}

/* Deals with a batch.  Events come first: what they changed must be known before faults are answered,
 * and the kernel hands out faults before older events.  Where events are not applied here, a batch
 * with one in it is Python's as a whole, and so is one that filled the buffer, since more may be
 * pending. */
static void take(struct uffdaemon_port *port, size_t count, uint64_t now, int applies)
{
    int rest = !applies && count == UFFDAEMON_MESSAGES;
    size_t faults = 0;

    for (size_t index = 0; index < count; index++) {
        const struct uffd_msg *message = &port->messages[index];
        struct uffdaemon_record record = {.message = *message, .latency = now};

        if (message->event == UFFD_EVENT_PAGEFAULT) {
            port->batch[faults++] = record;
            continue;
        }
        rest |= !applies;
        if (applies)
            uffdaemon_apply_event(port, &record);
        if (!uffdaemon_queue_push(&port->queue, &record, now))
            uffdaemon_snapshot_free(uffdaemon_record_snapshot(&record));
        uffdaemon_port_notify(port);
    }
    atomic_fetch_add(&port->reading, 1);
    if (faults && port->notify >= 0)
        uffdaemon_affinity_follow(
            &port->faults, (pid_t)port->batch[0].message.arg.pagefault.feat.ptid, faults, now);
    if (rest)
        hand_on(port, faults, now);
    else
        answer(port, faults, now);
}

static uint32_t rereads(const struct uffdaemon_port *port)
{
    return atomic_load_explicit(&port->rereads, memory_order_relaxed);
}

static void set_rereads(struct uffdaemon_port *port, uint32_t number)
{
    atomic_store_explicit(&port->rereads, number, memory_order_relaxed);
}

/* Adapts the number of reads to the load.  `gap` is the time (ns) since the last answer, `tries` how
 * many empty reads came before this one.  Only a hit shows that reading again is worth while; after
 * vain attempts more and more quick faults have to come before it is tried once more. */
static void busy(struct uffdaemon_port *port, uint64_t gap, unsigned tries)
{
    if (tries)
        port->misses = port->penalty = 0;
    if (rereads(port))
        return;
    if (gap >= BACK_TO_BACK_NS || port->last + gap < port->shunned)
        port->quick = 0;
    else if (++port->quick > port->penalty) {
        set_rereads(port, port->reread_limit);
        port->quick = port->misses = 0;
    }
}

static void idle(struct uffdaemon_port *port)
{
    if (!rereads(port) || ++port->misses < PATIENCE)
        return;
    set_rereads(port, 0);
    port->quick = port->misses = 0;
    if (port->penalty < MAX_PENALTY)
        port->penalty = 2 * port->penalty + 1;
}

/* Somebody else had the core for a time slice, milliseconds, when it was yielded at `now`.  A sleeper
 * gets it back at once when a fault wakes it, so reading again is given up for a while: a short one
 * if it was an accident, longer and longer if the core is wanted all the time. */
static void shun(struct uffdaemon_port *port, uint64_t now)
{
    /* Undisturbed for as long as the last time lasted: an accident again. */
    if (now - port->shunned > port->shun)
        port->shun = 0;
    port->shun = port->shun ? 2 * port->shun : SHUN_NS;
    if (port->shun > MAX_SHUN_NS)
        port->shun = MAX_SHUN_NS;
    port->shunned = now + port->shun;
    uffdaemon_affinity_give_up(now);
    set_rereads(port, 0);
    port->quick = port->misses = 0;
}

/* For others to look at; nobody else counts. */
static void count(_Atomic uint64_t *counter)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
                          memory_order_relaxed);
}

/* Whether a fault does not say whose it is. */
static int of_nobody(const struct uffd_msg *message)
{
    return message->event == UFFD_EVENT_PAGEFAULT && !message->arg.pagefault.feat.ptid;
}

/* Reads and answers once.  Returns the bytes read, or -errno.  Where events are applied, nobody may
 * act on what they void between their being read and being applied; who carries out operations is
 * not waited for without end, since he may wait for us. */
static long read_and_answer(struct uffdaemon_port *port, unsigned tries)
{
    ssize_t bytes;
    uint64_t now;
    int applies = uffdaemon_port_applies(port);
    int locked = applies && uffdaemon_lock_patiently(&port->executing) == 0;

    if (applies)
        pthread_mutex_lock(&port->change);

    atomic_fetch_add(&port->reading, 1);
    /* Who causes an event goes on once it is read: what others have decided on must be done by then. */
    if (atomic_load(&port->in_thread))
        uffdaemon_synchronize(&port->rules.readers);
    bytes = read(port->fd, port->messages, sizeof(port->messages));
    count(&port->reads);
    if (bytes <= 0)
        atomic_fetch_add(&port->reading, 1);
    if (bytes > 0) {
        now = uffdaemon_now();
        busy(port, now - port->last, tries);
        if (port->notify >= 0 && bytes == sizeof(struct uffd_msg) &&
            now - port->last < BACK_TO_BACK_NS && of_nobody(&port->messages[0]))
            uffdaemon_affinity_search(tries, now);
        take(port, (size_t)bytes / sizeof(struct uffd_msg), now, applies);
        port->last = now;
    } else {
        bytes = bytes ? -errno : -EIO;
    }
    if (applies)
        pthread_mutex_unlock(&port->change);
    if (locked)
        pthread_mutex_unlock(&port->executing);
    return bytes;
}

/* Tries once more what had to wait for an event to be over. */
static void try_postponed(struct uffdaemon_port *port)
{
    struct timespec pause = {0, POSTPONE_NS};
    uint64_t since = port->postponed_since, now;
    size_t count = port->postponed;

    nanosleep(&pause, NULL);
    now = uffdaemon_now();
    memcpy(port->batch, port->later, count * sizeof(port->later[0]));
    port->postponed = 0;
    answer(port, count, now);
    if (port->postponed) {
        port->postponed_since = since;
        if (now - since > MAX_POSTPONED_NS) {
            memcpy(port->batch, port->later, port->postponed * sizeof(port->later[0]));
            count = port->postponed;
            port->postponed = 0;
            for (size_t index = 0; index < count; index++)
                uffdaemon_queue_push(&port->queue, &port->batch[index], now);
            uffdaemon_port_notify(port);
        }
    }
}

/* Reads and answers until nothing is pending after the re-reads, a message is for Python, there is
 * enough for it to look at, or the turn is over.  Never sleeps.
 * Returns whether only its turn has ended, and more is likely to come at once. */
int uffdaemon_serve(struct uffdaemon_port *port)
{
    struct timespec pause = {0, POSTPONE_NS};
    uint64_t now = uffdaemon_now(), begun = now, before;
    unsigned tries = 0;

    while (!atomic_load_explicit(&port->closing, memory_order_relaxed)) {
        long bytes;

        /* An event that Python has not seen yet may void the rules: nothing is answered by them. */
        if (!uffdaemon_port_applies(port) &&
            (atomic_load_explicit(&port->queue.forwarded, memory_order_relaxed) ||
             uffdaemon_queue_count(&port->queue) >= ENOUGH)) {
            if (port->notify >= 0)
                nanosleep(&pause, NULL); /* what is not read stays ready */
            return 0;
        }
        bytes = read_and_answer(port, tries);
        if (bytes < 0) {
            if (bytes != -EAGAIN && bytes != -EINTR) {
                atomic_store_explicit(&port->error, (int32_t)-bytes, memory_order_relaxed);
                uffdaemon_port_notify(port);
                return 0;
            }
            count(&port->empty_reads);
            if (port->postponed) {
                try_postponed(port);
                return port->postponed > 0;
            }
            if (tries++ >= rereads(port)) {
                idle(port);
                return 0;
            }
            before = tries == 1 ? uffdaemon_now() : now;
            sched_yield();
            now = uffdaemon_now();
            if (now - before > CONTENDED_NS)
                shun(port, now);
            continue;
        }
        now = port->last;
        tries = 0;
        if (now - begun > TURN_NS)
            return rereads(port) > 0;
    }
    return 0;
}
