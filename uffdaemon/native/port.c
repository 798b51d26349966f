/* SPDX-License-Identifier: Apache-2.0 */
/* What Python does with a port: publish rules, dequeue records, and carry out operations. */
#include "port.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base.h"
#include "messages.h"
#include "snapshot.h"

/* A port for the userfaultfd `fd`, or NULL.  With an eventfd in `notify` (else -1), records are
 * announced there, and C applies events. */
struct uffdaemon_port *uffdaemon_port_new(int fd, unsigned reread_limit, int notify)
{
    struct uffdaemon_port *port = aligned_alloc(UFFDAEMON_PORT_ALIGNMENT, sizeof(*port));

    if (!port)
        return NULL;
    memset(port, 0, sizeof(*port));
    port->queue.full = notify < 0 ? UFFDAEMON_ENOUGH : UFFDAEMON_FULL;
    if (!uffdaemon_queue_reserve(&port->queue)) {
        free(port);
        return NULL;
    }
    port->spare = -1;
    uffdaemon_spare_open(&port->spare);
    port->fd = fd;
    port->reread_limit = reread_limit;
    port->notify = notify;
    port->process = getpid();
    return port;
}

/* In a forked child, locks may be held, and rules read, by threads that exist only in the
 * parent. */
static int inherited(const struct uffdaemon_port *port)
{
    return port->process != getpid();
}

/* Nothing serves the port any more. */
void uffdaemon_port_close_spare(struct uffdaemon_port *port)
{
    if (!inherited(port))
        uffdaemon_spare_close(&port->spare);
}

/* No other thread may use the port. */
void uffdaemon_port_free(struct uffdaemon_port *port)
{
    struct uffdaemon_record record;

    while (uffdaemon_queue_dequeue(&port->queue, &record, 1))
        uffdaemon_snapshot_free(uffdaemon_record_snapshot(&record));
    uffdaemon_queue_free(&port->queue);
    uffdaemon_port_close_spare(port);
    uffdaemon_table_free(uffdaemon_table_load(&port->rules));
    free(port);
}

/* Dequeues at most `capacity` records, the oldest first; returns how many. */
long uffdaemon_port_dequeue(struct uffdaemon_port *port, struct uffdaemon_record *records,
                            size_t capacity)
{
    uffdaemon_spare_open(&port->spare);
    atomic_store(&port->notified, 0);
    return uffdaemon_queue_dequeue(&port->queue, records, capacity);
}

/* Python has finished what it dequeued: nothing is outstanding. */
void uffdaemon_port_end_batch(struct uffdaemon_port *port)
{
    uffdaemon_queue_end_batch(&port->queue);
}

/* Replaces all rules by these, sorted by (kind, start) and without overlaps, made by somebody who
 * knows of `events` events.  -EAGAIN: there have been more, which void them. */
int uffdaemon_port_publish(struct uffdaemon_port *port, const struct uffdaemon_rule *rules,
                           size_t count, uint64_t events)
{
    struct uffdaemon_table *table = NULL;

    if (inherited(port))
        return 0;
    if (count) {
        table = uffdaemon_table_new(count);
        if (!table)
            return -ENOMEM;
        for (size_t index = 0; index < count; index++)
            uffdaemon_table_add(table, &rules[index]);
    }
    uffdaemon_lock(&port->change);
    if (port->rearranged > events || port->unbooked > events) {
        uffdaemon_unlock(&port->change);
        uffdaemon_table_free(table);
        return -EAGAIN;
    }
    uffdaemon_table_replace(&port->rules, table);
    uffdaemon_unlock(&port->change);
    return 0;
}

/* What is to be disabled: with neither pages nor a source, all. */
struct condemned {
    const struct uffdaemon_pages *pages; /* the rules of this book */
    uint64_t start, end;                 /* the rules that move from this range */
};

static int is_condemned(const struct uffdaemon_rule *rule, const struct condemned *condemned)
{
    if (condemned->pages)
        return uffdaemon_rule_pages(rule) == condemned->pages;
    if (condemned->end)
        return rule->code == _UFFDIO_MOVE && rule->src < condemned->end &&
               condemned->start < rule->src + (rule->end - rule->start);
    return 1;
}

/* Disables rules until new ones are published; none of them is in use when this returns.  Their
 * ranges stay: events still update the page states, and faulting threads still know to wait. */
static void disable(struct uffdaemon_port *port, const struct condemned *condemned)
{
    struct uffdaemon_table *table = NULL;
    const struct uffdaemon_table *old;

    if (inherited(port))
        return;
    uffdaemon_lock(&port->change);
    old = uffdaemon_table_load(&port->rules);
    if (old)
        table = uffdaemon_table_new(old->count);
    for (size_t index = 0; table && index < old->count; index++) {
        struct uffdaemon_rule rule = old->rules[index];

        if (is_condemned(&rule, condemned))
            rule.code = 0;
        uffdaemon_table_add(table, &rule);
    }
    uffdaemon_table_replace(&port->rules, table);
    uffdaemon_unlock(&port->change);
}

/* All rules. */
void uffdaemon_port_withdraw(struct uffdaemon_port *port)
{
    disable(port, &(struct condemned){0});
}

/* Those of one page book, wherever events have moved them. */
void uffdaemon_port_withdraw_pages(struct uffdaemon_port *port, const struct uffdaemon_pages *pages)
{
    disable(port, &(struct condemned){.pages = pages});
}

/* Those that move from a range, which is not empty. */
void uffdaemon_port_withdraw_source(struct uffdaemon_port *port, uint64_t start, uint64_t end)
{
    disable(port, &(struct condemned){.start = start, .end = end});
}

/* REMOVE events inside of this range are those of a release: the pages are empty, not discarded. */
void uffdaemon_port_expect_release(struct uffdaemon_port *port, uint64_t start, uint64_t end)
{
    if (inherited(port))
        return;
    uffdaemon_lock(&port->change);
    for (size_t index = 0; index < UFFDAEMON_RELEASES; index++)
        if (port->releases[index].start == port->releases[index].end) {
            port->releases[index].start = start;
            port->releases[index].end = end;
            break;
        }
    uffdaemon_unlock(&port->change);
}

/* Whoever releases it has come to an end, so all those events have been read; with `change` they
 * have been applied. */
void uffdaemon_port_end_release(struct uffdaemon_port *port, uint64_t start, uint64_t end)
{
    if (inherited(port))
        return;
    uffdaemon_lock(&port->change);
    for (size_t index = 0; index < UFFDAEMON_RELEASES; index++)
        if (start <= port->releases[index].start && port->releases[index].end <= end)
            port->releases[index].start = port->releases[index].end = 0;
    uffdaemon_unlock(&port->change);
}

/* Waits until no event is half applied: all that was read before is in the queue. */
void uffdaemon_port_settle(struct uffdaemon_port *port)
{
    if (!inherited(port) && uffdaemon_timedlock(&port->change) == 0)
        uffdaemon_unlock(&port->change);
}

/* Leaves faults that wait for an event's end to Python.  By the thread that serves the port, or
 * when nobody does any more. */
void uffdaemon_port_hand_over(struct uffdaemon_port *port)
{
    for (size_t index = 0; index < port->postponed; index++) {
        port->later[index].error = EAGAIN;
        uffdaemon_queue_push(&port->queue, &port->later[index], uffdaemon_now());
    }
    port->postponed = 0;
    uffdaemon_port_notify(port);
}

/* Notifies Python of records, once until it has dequeued some.  Async-signal-safe. */
void uffdaemon_port_notify(struct uffdaemon_port *port)
{
    uint64_t one = 1;

    if (port->notify >= 0 && !atomic_exchange(&port->notified, 1))
        while (write(port->notify, &one, sizeof(one)) < 0 && errno == EINTR)
            ;
}

/* Wakes the threads that wait in their signal handler for a page in the range. */
void uffdaemon_port_wake(struct uffdaemon_port *port, uint64_t start, uint64_t length)
{
    uffdaemon_wait_queue_wake(&port->waiting, start, length);
}
