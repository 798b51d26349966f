/*
 * The rules in force, replaced while faults arrive.
 *
 * A table never changes once it is in force.  Who reads one says so before and after (`enter`,
 * `leave`) and never blocks; who has put another in its place waits until nobody can be reading the
 * old one any more, which takes no longer than one ioctl.  Signal handlers read, too: nothing here
 * that they call allocates or waits, but for a lock that is held for a few instructions at a time,
 * by threads that have signals of their own kind blocked.
 */
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "native.h"

uint64_t uffdaemon_replaced;

void uffdaemon_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        sched_yield();
}

void uffdaemon_unlock(uint32_t *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

/* Returns a ticket to leave with.  What is loaded in between stays valid until then. */
unsigned uffdaemon_enter(struct uffdaemon_readers *readers)
{
    unsigned ticket = __atomic_load_n(&readers->epoch, __ATOMIC_SEQ_CST) & 1;

    __atomic_fetch_add(&readers->inside[ticket], 1, __ATOMIC_SEQ_CST);
    return ticket;
}

void uffdaemon_leave(struct uffdaemon_readers *readers, unsigned ticket)
{
    __atomic_fetch_sub(&readers->inside[ticket], 1, __ATOMIC_SEQ_CST);
}

/* Returns when everybody has left who entered before the call.  Those who enter meanwhile are
 * counted elsewhere, so that they cannot keep it waiting; both sides are waited for, since somebody
 * may have looked at the epoch long before he says that he is there.  Others who wait at the same
 * time turn the epoch as well, so that one side may come up twice. */
void uffdaemon_wait_for_readers(struct uffdaemon_readers *readers)
{
    struct timespec pause = {0, 20000};

    for (unsigned empty = 0; empty != 3;) {
        unsigned old = __atomic_fetch_add(&readers->epoch, 1, __ATOMIC_SEQ_CST) & 1;

        for (unsigned tries = 0; __atomic_load_n(&readers->inside[old], __ATOMIC_SEQ_CST); tries++)
            if (tries < 100)
                sched_yield();
            else
                nanosleep(&pause, NULL);
        empty |= 1u << old;
    }
}

/* Room for `count` rules, or NULL. */
struct uffdaemon_table *uffdaemon_table_new(size_t count)
{
    struct uffdaemon_table *table =
        malloc(sizeof(*table) + count * sizeof(struct uffdaemon_rule));

    if (table)
        table->count = count;
    return table;
}

/* The table in force, or NULL: to be asked for between `enter` and `leave`. */
struct uffdaemon_table *uffdaemon_table_of(struct uffdaemon_port *port)
{
    return __atomic_load_n(&port->table, __ATOMIC_SEQ_CST);
}

static void set_bounds(struct uffdaemon_port *port, const struct uffdaemon_table *table)
{
    uint64_t low = UINT64_MAX, high = 0;

    for (size_t index = 0; table && index < table->count; index++) {
        if (table->rules[index].start < low)
            low = table->rules[index].start;
        if (table->rules[index].end > high)
            high = table->rules[index].end;
    }
    __atomic_store_n(&port->low, low, __ATOMIC_RELAXED);
    __atomic_store_n(&port->high, high, __ATOMIC_RELAXED);
}

/* Puts `table` (NULL: no rules) in force; the old one is gone when this returns.  Under `change`. */
void uffdaemon_replace(struct uffdaemon_port *port, struct uffdaemon_table *table)
{
    struct uffdaemon_table *old = __atomic_exchange_n(&port->table, table, __ATOMIC_SEQ_CST);

    __atomic_fetch_add(&uffdaemon_replaced, 1, __ATOMIC_SEQ_CST);
    set_bounds(port, table);
    uffdaemon_wait_for_readers(&port->readers);
    free(old);
}
